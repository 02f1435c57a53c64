"""Rows of the ledger for tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nemotron_launch.jobs.process import identity
from nemotron_launch.jobs.run import Run


def row(run_id: str = "a-run", folder: Path = Path("/nowhere"), **fields: Any) -> Run:
    """A run on this machine that is about to be submitted."""
    run_dir = str(folder / run_id)
    values: dict[str, Any] = {
        "step": "rl/pairs", "config": "tiny", "config_sha256": "", "profile": "local", "executor": "local",
        "run_dir": run_dir, "state_dir": run_dir, "workdir": str(folder), "output_dir": f"{run_dir}/output", "nodes": 1,
        "created": time.time(), "submitter": identity(),
    }  # fmt: skip
    return Run(**{"run_id": run_id, **values, **fields})
