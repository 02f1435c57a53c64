"""The comparison with trl runs, on a tiny shape: what it compares, not how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "grpo_throughput.py"


@pytest.mark.slow
def test_both_sides_roll_out_and_train():
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(done.stdout)
    for side in (result["ours"], result["trl"]):
        assert 6 < side["tokens_per_answer"] <= 8
        assert 0 < side["generation_seconds"] < side["step_seconds"]
        assert 0 <= side["reward"] <= 1
    assert min(result["rollout_ratio"], result["step_ratio"]) > 0
