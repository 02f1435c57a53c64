"""`nemotron ui`: the runs of this machine's ledger in a browser, served to its user alone. Imported by `cli/ui.py`."""
