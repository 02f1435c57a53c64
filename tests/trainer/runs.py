"""Real runs of the trainer, small, in processes of their own started through `spawn`: their files, their numbers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemotron_launch.config.compose import compose

REPOSITORY = Path(__file__).parents[2]
STEPS = {
    "dpo": REPOSITORY / "steps/rl/nemo_rl/dpo",
    "sft": REPOSITORY / "steps/sft/megatron",
    "grpo": REPOSITORY / "steps/rl/nemo_rl/rlvr",
    "rm": REPOSITORY / "steps/rm/hf",
}
WAIT = 120.0  # seconds for what takes four on an idle machine

# One layer, 48 rows, batches of 8: six steps an epoch, a few milliseconds a step.
SMALL = {
    "policy.architecture.num_layers": 1,
    "policy.architecture.hidden_size": 32,
    "policy.architecture.num_attention_heads": 2,
    "policy.architecture.num_key_value_heads": 2,
    "policy.architecture.intermediate_size": 32,
    "policy.train_global_batch_size": 8,
    "policy.train_micro_batch_size": 4,
    "policy.megatron_cfg.optimizer.lr": 1e-3,
    "policy.megatron_cfg.optimizer.min_lr": 0,
    "policy.megatron_cfg.scheduler.lr_warmup_iters": 0,
    "checkpointing.save_period": 2,
}
ROWS = {
    "max_num_steps": 7,
    "max_num_epochs": 10,
    "val_period": 3,
    "val_global_batch_size": 8,
    "val_micro_batch_size": 4,
    "val_generation.num_prompts": 4,
    "val_generation.max_new_tokens": 4,
}
# 48 prompts, 8 a step: six steps an epoch; 32 rollouts a step make two optimizer steps of 16. What it takes to be
# rewarded, a digit, a hardly trained model writes now and then.
ROLLOUTS = {
    "grpo.max_num_steps": 7,
    "grpo.max_num_epochs": 10,
    "grpo.num_prompts_per_step": 8,
    "grpo.num_generations_per_prompt": 4,
    "grpo.val_period": 3,
    "grpo.max_val_samples": 4,
    "grpo.val_batch_size": 4,
    "grpo.val_num_generations_per_prompt": 2,
    "grpo.seq_logprob_error_threshold": 2,
    "loss_fn.force_on_policy_ratio": False,
    "loss_fn.reference_policy_kl_penalty": 0.01,
    "policy.train_global_batch_size": 16,
    "policy.train_micro_batch_size": 8,
    "policy.logprob_batch_size": 16,
    "policy.generation.max_new_tokens": 8,
    "data.default.env_name": "regex",
}
SECTIONS = {
    "dpo": {f"dpo.{key}": value for key, value in ROWS.items()},
    "sft": {f"sft.{key}": value for key, value in ROWS.items()},
    "grpo": ROLLOUTS,
    "rm": {f"rm.{key}": value for key, value in ROWS.items() if not key.startswith("val_generation")},
}


@dataclass
class Finished:
    """How an attempt ended, and all that it printed."""

    code: int
    said: str


@dataclass
class Run:
    """A run in `folder`: its config, its attempts, what it left behind."""

    step: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    procs: int = 1

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def with_(self, procs: int | None = None, **options: Any) -> Run:
        """The same run with other options: `policy__precision` is policy.precision."""
        changed = {key.replace("__", "."): value for key, value in options.items()}
        return Run(self.step, self.folder, {**self.options, **changed}, procs or self.procs)

    def config(self) -> Path:
        """The composed config in a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = self.folder / "data"
        if not data.exists():
            data.mkdir()
            for name, rows in (("train", 48), ("validation", 12)):
                lines = (STEPS[self.step] / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)[:rows]
                if self.step == "grpo":
                    lines = [line.replace('"expected_answer"', '"regex": "[0-9]", "was"') for line in lines]
                (data / f"{name}.jsonl").write_text("".join(lines))
        options = {
            "output_dir": str(self.out),
            **SMALL,
            **SECTIONS[self.step],
            "data.train.data_path": str(data / "train.jsonl"),
            "data.validation.data_path": str(data / "validation.jsonl"),
            "cluster.procs_per_node": self.procs,
            **self.options,
        }
        gone = {f"{key}." for key, value in options.items() if value is None}  # a section that is null has no keys
        kept = {key: value for key, value in options.items() if not key.startswith(tuple(gone) or ("?",))}
        overrides = [f"{key}={json.dumps(value)}" for key, value in kept.items()]
        composed = compose(STEPS[self.step] / "config/tiny.yaml", overrides, schema=STEPS[self.step] / "schema.json")
        handle, name = tempfile.mkstemp(suffix=".yaml", dir=self.folder)
        os.close(handle)
        config = {key: value for key, value in composed.data.items() if key != "run"}
        Path(name).write_text(yaml.safe_dump(config, sort_keys=False))
        return Path(name)

    def start(self, *spawn: object, patch: str = "", procs: int | None = None) -> subprocess.Popen[str]:
        """An attempt. patch: Python that runs before the trainer does, in every rank."""
        config, script = self.config(), STEPS[self.step] / "train.py"
        if patch:
            script = self.folder / f"train_{time.monotonic_ns()}.py"
            script.write_text(
                PATCHED.format(patch=textwrap.dedent(patch), step=self.step, folder=str(STEPS[self.step]))
            )
        command = [sys.executable, "-m", "nemotron_launch.trainer.spawn", "--procs", str(procs or self.procs)]
        command += ["--output-dir", str(self.out), *map(str, spawn), "--", str(script), "--config", str(config)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    def go(self, *spawn: object, patch: str = "", procs: int | None = None) -> Finished:
        """An attempt, to its end."""
        return end(self.start(*spawn, patch=patch, procs=procs))

    def metrics(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def numbers(self) -> dict[int, dict[str, float]]:
        """Of each step what training and validation computed: all but times."""
        kept = ("train/", "validation", "epoch")
        return {
            line["step"]: {key: value for key, value in line.items() if key.startswith(kept)} for line in self.metrics()
        }

    def saved(self) -> list[int]:
        """The steps whose checkpoints count."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*"))

    def info(self, step: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.checkpoints / f"step_{step}" / "training_info.json").read_text())
        return found

    def tensors(self, step: int) -> dict[str, Any]:
        return tensors(self.checkpoints / f"step_{step}")


PATCHED = """
import functools, os, signal, sys, time
from pathlib import Path
PID, RANK = os.getpid(), int(os.environ["RANK"])

def at_call(owner, name, number, act, where=lambda *a, **k: True):
    # Before the number-th call of owner.name for which `where` holds, do `act`; counted in this process only.
    original, count = getattr(owner, name), [0]
    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        if where(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                act()
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)

def kill():
    os.kill(PID, signal.SIGKILL)
    time.sleep(60)

from nemotron_launch.trainer import checkpoints, loop, metrics, policy, setup
{patch}
from nemotron_launch.trainer.{step} import main
sys.exit(main(Path({folder!r})))
"""


def end(process: subprocess.Popen[str]) -> Finished:
    try:
        said, _ = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.communicate()
    return Finished(process.returncode, said)


IN_ONE_PROCESS = """
import contextlib, importlib, io, json, sys
from pathlib import Path
for step, folder, config in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = importlib.import_module(f"nemotron_launch.trainer.{step}").main(Path(folder), ["--config", config])
    print("ENDED", json.dumps([code, said.getvalue()]), flush=True)
"""


def refuse(runs: Mapping[str, Run]) -> dict[str, Finished]:
    """One attempt of each run, one after the other in one process, as starting it costs more than a refusal."""
    wanted = [(run.step, str(STEPS[run.step]), str(run.config())) for run in runs.values()]
    command = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(wanted)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=WAIT)
    ended = [json.loads(line.removeprefix("ENDED ")) for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    assert len(ended) == len(runs), done.stdout + done.stderr
    return {name: Finished(*end) for name, end in zip(runs, ended, strict=True)}


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, weights and optimizer, by its key."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint / "policy/weights/iter_0000000")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    found = dict(_leaves(state))
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, io.BytesIO):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value


def assert_same_tensors(got: dict[str, Any], expected: dict[str, Any]) -> None:
    import torch

    assert got.keys() == expected.keys()
    assert got
    for key in expected:
        assert torch.equal(got[key], expected[key]), key


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + WAIT
    while not holds():
        assert process.poll() is None, f"ended early: {process.communicate()[0]}"
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)
