"""Tensor, pipeline, data and sequence parallelism against one process: the same losses, gradients and texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from models import hf_model, policy_of

from nemotron_launch.trainer.hand_over import write_weights

WORKER = Path(__file__).with_name("layout_worker.py")
LAYOUTS = {
    "tp2": ("--tp", "2"),
    "tp2-sp": ("--tp", "2", "--sp"),
    "pp2": ("--pp", "2"),
    "dp2": (),
    "tp2-sp-recompute": ("--tp", "2", "--sp", "--recompute"),
    "pp2-recompute": ("--pp", "2", "--recompute"),
}
WAYS = {"micro 4": ("--micro", "4"), "no-sharing": ("--no-sharing",), "recompute": ("--recompute",)}


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request, tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    family = "llama" if request.param == "untied" else "qwen3"
    policy = policy_of(hf_model(family, tied=request.param == "tied"), layout)
    write_weights(policy, folder)
    return folder


def train(model: Path, folder: Path, procs: int, runs: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """What each of the runs saw, one after the other in the same processes: to start these costs more than a run."""
    outs = {name: folder / f"{procs} {name}.json" for name in runs}
    words = [["--model", str(model), "--out", str(outs[name]), *options] for name, options in runs.items()]
    listed = folder / f"{procs}.json"
    listed.write_text(json.dumps(words))
    command = [sys.executable, "-W", "ignore", "-m", "nemotron_launch.trainer.spawn", "--procs", str(procs), "--"]
    env = {**os.environ, "PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, str(WORKER), str(listed)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads(out.read_text()) for name, out in outs.items()}


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> dict[str, dict]:
    """`first`, which saves after three steps, the LAYOUTS, `alone` on one process and in other WAYS."""
    folder = tmp_path_factory.mktemp("layouts")
    first = {"first": ("--tp", "2", "--steps", "3", "--save", str(model.parent / "saved"))}
    return train(model, folder, 2, first | LAYOUTS) | train(model, folder, 1, {"alone": (), **WAYS})


def assert_same_steps(got: list[dict], expected: list[dict], *, relative: float = 1e-5) -> None:
    for step, (here, there) in enumerate(zip(got, expected, strict=True)):
        for name in ("loss", "grad_norm", "accuracy", "rewards_chosen_mean"):
            assert here[name] == pytest.approx(there[name], rel=relative, abs=1e-5), f"{name} at step {step}"


def assert_same_rollout_steps(got: list[dict], expected: list[dict]) -> None:
    """Losses and what is logged of them, extremes too, and the gradient's norm."""
    assert expected[2]["probs_ratio_max"] > 1.05
    for step, (here, there) in enumerate(zip(got, expected, strict=True)):
        for name, value in there.items():
            assert here[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} at step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_and_writes_like_one_process(trained, name):
    got, alone = trained[name], trained["alone"]
    assert_same_steps(got["steps"], alone["steps"])
    assert_same_rollout_steps(got["grpo"], alone["grpo"])
    for temperature, texts in alone["texts"].items():
        for (ids, logps), (expected_ids, expected_logps) in zip(got["texts"][temperature], texts, strict=True):
            assert ids == expected_ids
            assert logps == pytest.approx(expected_logps, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_how_a_batch_is_computed_changes_no_loss(trained, way):
    got, alone = trained[way], trained["alone"]
    assert_same_steps(got["steps"], alone["steps"])
    assert_same_rollout_steps(got["grpo"], alone["grpo"])


@pytest.mark.slow
@pytest.mark.parametrize("target", [("1",), ("2", "--pp", "2"), ("2",), ("2", "--tp", "2")], ids=" ".join)
def test_a_checkpoint_of_two_tensor_ranks_resumes_at_another_layout(model, trained, target, tmp_path):
    rest = (*target[1:], "--first-step", "3", "--steps", "2", "--load", str(model.parent / "saved"))
    got = train(model, tmp_path, int(target[0]), {"rest": rest})["rest"]
    assert_same_steps(trained["first"]["steps"] + got["steps"], trained["alone"]["steps"])


def test_megatron_keys_are_those_that_transformer_engine_would_write(layout):
    """So that checkpoints interchange with GPU containers (the names are read in megatron-core, not run on a GPU)."""
    policy = policy_of(hf_model("llama"), layout)
    keys = {tensor.key for tensor in policy.gpt.sharded_state_dict().values() if hasattr(tensor, "global_shape")}
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys
    assert "embedding.word_embeddings.weight" in keys
