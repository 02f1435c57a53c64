"""Tensor, pipeline, data and sequence parallelism against one process: the same losses, gradients and texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request, tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    family = "llama" if request.param == "untied" else "qwen3"
    policy = policy_of(hf_model(family, tied=request.param == "tied"), layout)
    write_weights(policy, folder)
    return folder


def train(model: Path, out: Path, procs: int, *options: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "nemotron_launch.trainer.spawn", "--procs", str(procs), "--"]
    command += [str(WORKER), "--model", str(model), "--out", str(out), *map(str, options)]
    env = {**os.environ, "PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return train(model, tmp_path_factory.mktemp("alone") / "out.json", 1)


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
def test_layout_trains_and_writes_like_one_process(model, alone, name, tmp_path):
    got = train(model, tmp_path / "out.json", 2, *LAYOUTS[name])
    assert_same_steps(got["steps"], alone["steps"])
    assert_same_rollout_steps(got["grpo"], alone["grpo"])
    for temperature, texts in alone["texts"].items():
        for (ids, logps), (expected_ids, expected_logps) in zip(got["texts"][temperature], texts, strict=True):
            assert ids == expected_ids
            assert logps == pytest.approx(expected_logps, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--micro", "4"), ("--no-sharing",), ("--recompute",)], ids=" ".join)
def test_how_a_batch_is_computed_changes_no_loss(model, alone, options, tmp_path):
    got = train(model, tmp_path / "out.json", 1, *options)
    assert_same_steps(got["steps"], alone["steps"])
    assert_same_rollout_steps(got["grpo"], alone["grpo"])


@pytest.mark.slow
@pytest.mark.parametrize("target", [("1",), ("2", "--pp", "2"), ("2",), ("2", "--tp", "2")], ids=" ".join)
def test_a_checkpoint_of_two_tensor_ranks_resumes_at_another_layout(model, alone, target, tmp_path):
    first = train(model, tmp_path / "first.json", 2, "--tp", "2", "--steps", "3", "--save", tmp_path / "saved")
    rest = train(
        model, tmp_path / "rest.json", int(target[0]), *target[1:], "--first-step", "3", "--steps", "2",
        "--load", tmp_path / "saved",
    )  # fmt: skip
    assert_same_steps(first["steps"] + rest["steps"], alone["steps"])


def test_megatron_keys_are_those_that_transformer_engine_would_write(layout):
    """So that checkpoints interchange with GPU containers (the names are read in megatron-core, not run on a GPU)."""
    policy = policy_of(hf_model("llama"), layout)
    keys = {tensor.key for tensor in policy.gpt.sharded_state_dict().values() if hasattr(tensor, "global_shape")}
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys
    assert "embedding.word_embeddings.weight" in keys
