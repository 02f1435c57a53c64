"""The shipped pipeline as a newcomer runs it: the whole chain, what it learns, and the model that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.artifacts.record import read
from nemotron_launch.resources import pipelines_dir
from tests.step_trees import REPOSITORY

pytestmark = pytest.mark.slow
STAGES = ["sft-rows", "pairs", "prompts", "sft", "dpo", "rlvr", "to-hf"]
LIMIT = 360.0  # seconds that it may take on two cores; a fifth of that, where nothing else runs


@dataclass(frozen=True)
class Done:
    """The finished pipeline. folder: its output_dir."""

    folder: Path
    env: dict[str, str]
    seconds: float

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return command(self.folder.parent, self.env, *words)

    def metric(self, stage: str, name: str) -> list[float]:
        lines = [json.loads(line) for line in (self.folder / stage / "metrics.jsonl").read_text().splitlines()]
        return [line[name] for line in lines if name in line]


def command(cwd: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "nemotron_launch", *words]
    return subprocess.run(whole, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Done:
    home = tmp_path_factory.mktemp("aligned")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "RL_OUTPUT_DIR": str(home), "NEMOTRON_STATE_DIR": str(home / "state")}
    env = {**os.environ, **more, "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    done = command(home, env, "pipeline", "run", str(pipelines_dir() / "align-tiny.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    return Done(home / "align-tiny", env, time.monotonic() - start)


def test_the_whole_chain_is_done_in_time_and_recorded(aligned: Done) -> None:
    assert aligned.seconds < LIMIT
    stages = json.loads(aligned("pipeline", "status", "align-tiny", "--json").stdout)
    assert [(one["stage"], one["state"]) for one in stages] == [(name, "done") for name in STAGES]
    for name in STAGES:
        record = read(aligned.folder / name)
        assert record and record.artifacts, name


def test_the_same_command_again_runs_nothing(aligned: Done) -> None:
    before = {path: path.stat().st_mtime_ns for path in aligned.folder.rglob("*") if path.is_file()}
    done = aligned("pipeline", "run", "align-tiny")
    assert (done.returncode, done.stderr.count(" is done: ")) == (0, len(STAGES))
    assert {path: path.stat().st_mtime_ns for path in aligned.folder.rglob("*") if path.is_file()} == before


def test_preferences_and_rewards_both_teach_something(aligned: Done) -> None:
    """Exact match of held-out prompts: half of the warm start's answers are descending, and right ones ascending."""
    start, *_, preferred = aligned.metric("dpo", "validation-default/exact_match")
    assert start <= 0.6 and preferred >= start + 0.15
    sampled = aligned.metric("rlvr", "validation/accuracy")
    greedy = aligned.metric("rlvr", "validation/greedy_accuracy")
    assert abs(greedy[0] - preferred) < 0.1  # it begins where DPO ended
    assert sampled[-1] >= sampled[0] + 0.1 and greedy[-1] >= 0.95


def test_trainers_take_the_rows_that_were_prepared(aligned: Done) -> None:
    for rows, stage in (("sft-rows", "sft"), ("pairs", "dpo"), ("prompts", "rlvr")):
        manifest = json.loads((aligned.folder / rows / "manifest.json").read_text())
        counts = manifest["counts"]
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
        assert counts["dropped"], "the tiny blends hold duplicates, leaks and bad rows"
        made, used = read(aligned.folder / rows), read(aligned.folder / stage)
        assert made and used
        assert [one.record for one in used.inputs if one.key == "data.manifest_path"] == [made.digest]


def test_transformers_computes_the_logits_of_the_policy(aligned: Done) -> None:
    """Beside the step's own comparison: 1e-4 apart at most, on held-out prompts with their answers."""
    checkpoint = aligned.folder / "rlvr/checkpoints/step_40"
    rows = next((aligned.folder / "prompts").glob("validation-*.jsonl"))
    script = Path(__file__).with_name("both_sides.py")
    whole = [sys.executable, "-W", "ignore", script, checkpoint, aligned.folder / "to-hf/hf", rows]
    done = subprocess.run(list(map(str, whole)), env=aligned.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert seen["texts"] == 20 and seen["difference"] < 1e-4


def test_a_changed_stage_runs_those_behind_it_and_none_before(aligned: Done) -> None:
    shown = aligned("pipeline", "status", "align-tiny", "rlvr.grpo.max_num_steps=41", "--json")
    states = {one["stage"]: one["state"] for one in json.loads(shown.stdout)}
    assert [name for name in STAGES if states[name] == "to do"] == ["rlvr", "to-hf"]
