"""Rollouts and the weights handed to a server, of every layout, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import hf_model, policy_of
from rollout_worker import rollouts, scores

from nemotron_launch.trainer.hand_over import write_weights

WORKER = Path(__file__).with_name("rollout_worker.py")
LAYOUTS = {"tp2-pp2": (4, "--tp", "2", "--pp", "2"), "dp2": (2,)}
CASES = [("untied", "tp2-pp2"), ("untied", "dp2"), ("tied", "tp2-pp2")]


@pytest.fixture(scope="module")
def start(request, layout, tmp_path_factory):
    """A model's folder, and what one process writes with it, all at once."""
    tied = request.param == "tied"
    policy = policy_of(hf_model("qwen3" if tied else "llama", tied=tied), layout)
    folder = tmp_path_factory.mktemp("model") / "model"
    write_weights(policy, folder)
    return folder, rollouts(policy, batch_size=None), scores(policy)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "name"), CASES, indirect=["start"])
def test_a_layout_rolls_out_and_hands_over_like_one_process(start, name, tmp_path):
    """The same tokens, with another rollout batch size too; the same weights bit for bit."""
    from safetensors.torch import load_file

    folder, alone, scored_alone = start
    procs, *options = LAYOUTS[name]
    command = [sys.executable, "-W", "ignore", "-m", "nemotron_launch.trainer.spawn", "--procs", str(procs), "--"]
    command += [str(WORKER), "--model", str(folder), "--out", str(tmp_path), *options]
    env = {**os.environ, "PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found, scored = json.loads((tmp_path / "rollouts.json").read_text())
    assert [ids for ids, _ in found] == [ids for ids, _ in alone]
    assert len({len(ids) for ids, _ in found}) > 5
    for (_, logps), (_, expected) in zip(found, alone, strict=True):
        assert logps == pytest.approx(expected, abs=1e-5)
    for values, expected in zip(scored, scored_alone, strict=True):
        # The trainer's log-probabilities; rows may be padded further for sequence parallelism.
        assert [value for value in values if value] == pytest.approx([value for value in expected if value], abs=1e-5)
    written = load_file(tmp_path / "weights" / "model.safetensors")
    given = load_file(folder / "model.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], value) for key, value in given.items())
