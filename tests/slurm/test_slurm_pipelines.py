"""Pipelines on a real Slurm: stages as jobs that wait for each other, and never run when the one before failed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Nemotron
from tests.sites import SLURM, profile_file
from tests.slurm.cluster import WAIT, Cluster
from tests.slurm.login import Client, client, login

__all__ = ["client", "login"]

PIPELINE = """\
output_dir: out
stages:
  - {name: second, step: rl/pairs, inputs: {checkpoint_megatron: first}}
  - {name: first, step: sft/small}
"""
Pipeline = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def pipeline(cluster: Cluster, tree: Path, nemotron: Nemotron, tmp_path: Path) -> Iterator[Pipeline]:
    """`nemotron pipeline run|status pair.yaml …` with the profile `cluster`; cancels what a failed test leaves."""
    profile = {**SLURM, "account": None, "mem": 100, "python": sys.executable, "time": "00:30:00"}
    profile_file(tmp_path / "profiles", "cluster", profile, remote_job_dir=str(tmp_path / "jobs"))
    (tmp_path / "jobs").mkdir()
    Path("pair.yaml").write_text(PIPELINE)
    profiles = ("--profiles", str(tmp_path / "profiles"))
    yield lambda verb, *words: nemotron("pipeline", verb, "pair.yaml", *profiles, *words, **cluster.env)
    runs = json.loads(nemotron("jobs", "list", "--json", **cluster.env).stdout)
    for run in runs:
        if run["state"] in ("pending", "running"):
            nemotron("jobs", "cancel", run["run_id"], **cluster.env)


def stages(pipeline: Pipeline, *words: str) -> list[dict[str, Any]]:
    done = pipeline("status", "--json", *words)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def until_over(pipeline: Pipeline, *words: str) -> list[dict[str, Any]]:
    end = time.monotonic() + WAIT
    while True:
        found = stages(pipeline, *words)
        if all(one["state"] not in ("pending", "running") for one in found):
            return found
        assert time.monotonic() < end, found
        time.sleep(0.2)


def test_stages_run_after_each_other_and_what_is_done_is_not_submitted_again(
    pipeline: Pipeline, cluster: Cluster
) -> None:
    done = pipeline("run", "-b", "cluster", "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert (first["stage"], second["stage"], second["after"]) == ("first", "second", [first["run_id"]])
    found = until_over(pipeline)
    assert [(one["stage"], one["state"], one["run_id"]) for one in found] == [
        ("first", "done", first["run_id"]), ("second", "done", second["run_id"])
    ]  # fmt: skip
    starts = [cluster.show(one["job_id"]) for one in (first, second)]
    assert starts[0]["EndTime"] <= starts[1]["StartTime"]
    seen = json.loads((Path(found[1]["output_dir"]) / "seen.json").read_text())
    assert seen["config"]["checkpointing"]["pretrained"] == "out/first/checkpoints"
    assert Path(found[0]["output_dir"]).parent.parent == Path(first["run_dir"]).parent
    again = pipeline("run", "-b", "cluster", "--json")
    assert (again.returncode, json.loads(again.stdout)) == (0, [])


def test_a_stage_on_this_machine_hands_on_to_one_on_its_cluster(pipeline: Pipeline) -> None:
    Path("pair.yaml").write_text(PIPELINE.replace("step: rl/pairs", "step: rl/pairs, profile: cluster"))
    refused = pipeline("run", "-b", "local")
    assert refused.returncode == 2 and "neither can wait for the other" in refused.stderr
    done = pipeline("run")
    assert done.returncode == 0, done.stderr
    first, second = stages(pipeline)
    assert (first["profile"], second["profile"]) == ("", "cluster")
    seen = json.loads((Path(second["output_dir"]) / "seen.json").read_text())
    assert seen["config"]["checkpointing"]["pretrained"] == str(Path("out/first/checkpoints").absolute())


def test_what_is_missing_on_the_cluster_is_said_before_anything_is_submitted(pipeline: Pipeline) -> None:
    done = pipeline("run", "-b", "cluster", "second.data.path=nope.jsonl")
    assert done.returncode == 2
    assert "stage second: data.path: there is no file nope.jsonl" in done.stderr
    assert [one["run_id"] for one in stages(pipeline)] == [None, None]


def test_a_stage_behind_one_that_fails_never_runs_and_the_same_command_goes_on(pipeline: Pipeline) -> None:
    done = pipeline("run", "-b", "cluster", "--json", "first.exit=3")
    assert done.returncode == 0, done.stderr
    first, second = until_over(pipeline, "first.exit=3")
    assert (first["run_state"], first["exit_code"]) == ("failed", 3)
    assert second["run_state"] == "cancelled" and not Path(second["output_dir"]).exists()
    attached = pipeline("run", "-r", "cluster")
    assert attached.returncode == 0, attached.stderr
    assert "stage 1 of 2, first: sft/small -c default, again: its config has changed" in attached.stderr
    assert [one["state"] for one in stages(pipeline)] == ["done", "done"]


@pytest.mark.slow
def test_over_ssh_stages_are_followed_and_what_a_changed_one_left_is_moved_aside_there(client: Client) -> None:
    (client.folder / "pair.yaml").write_text(PIPELINE)
    command = ("pipeline", "run", "pair.yaml", "-r", "./site.yaml")
    client.run(*command)
    found = json.loads(client.run("pipeline", "status", "pair.yaml", "-p", "./site.yaml", "--json"))
    assert [one["state"] for one in found] == ["done", "done"]
    client.run(*command, "second.env_vars={A: 1}")
    there = client.folder / "cluster" / "out"
    assert sorted(path.name for path in there.iterdir()) == ["first", "second", "second.1"]
    configs = [json.loads((there / name / "seen.json").read_text())["config"] for name in ("second", "second.1")]
    assert [config.get("env_vars") for config in configs] == [{"A": 1}, None]
    rows = json.loads(client.run("jobs", "list", "--json"))
    assert [row["stage"] for row in rows][::-1] == ["first", "second", "second"]
