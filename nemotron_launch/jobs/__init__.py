"""Runs after they were compiled: the ledger of submissions, following them, and what can be done to them."""
