"""The comparison with `datasets` runs, on few rows: that both keep the same ones, and all faults are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "rl_prep.py"


@pytest.mark.slow
def test_both_sides_keep_the_same_rows_and_every_fault_that_is_known_is_found(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "2MB", "--json", "--folder", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "NEMOTRON_TEST_GSM8K"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["generated"]
    assert result["as_known"]
    assert result["dropped"]["near_duplicate"] > 20
    ours, theirs = result["ours"], result["datasets"]
    assert (ours["train"], ours["validation"]) == (theirs["train"], theirs["validation"])
    assert min(side["seconds"] * side["peak_mib"] for side in (ours, theirs)) > 0
    assert not list(tmp_path.iterdir())
