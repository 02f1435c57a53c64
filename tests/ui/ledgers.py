"""Ledgers that went wrong."""

from __future__ import annotations

from pathlib import Path


def damage(state: Path) -> None:
    """Put a file that is no database in the ledger's place, at once, for others may look meanwhile."""
    bad = state / "bad"
    bad.write_bytes(b"no database" * 500)
    bad.replace(state / "jobs.db")
    for path in state.glob("jobs.db-*"):
        path.unlink()
