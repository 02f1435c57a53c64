"""Typed outputs of runs: recorded beside them and in the ledger, named by later steps, checked along the chain."""
