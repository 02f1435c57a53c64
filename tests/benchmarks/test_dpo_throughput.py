"""The comparison with trl runs, on a tiny shape: what it compares, not how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "dpo_throughput.py"


@pytest.mark.slow
def test_both_sides_train_alike():
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [result["mode"] for result in results] == ["online", "kept"]
    for result in results:
        ours, trl = result["ours"], result["trl"]
        assert ours["losses"] == pytest.approx(trl["losses"], abs=1e-5)
        assert ours["losses"][0] == pytest.approx(0.693147, abs=1e-6)  # ln 2: policy and reference are the same
        assert ours["losses"][1] != ours["losses"][0]
        assert min(ours["tokens_per_s"], trl["tokens_per_s"], ours["peak_mib"], trl["peak_mib"]) > 0
    assert results[1]["ours"]["seconds"]["reference"] > 0
