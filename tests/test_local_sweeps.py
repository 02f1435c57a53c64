"""Sweeps on this machine: one point after another or several at once, attached and in the background."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Nemotron
from tests.sites import profile_file

Ask = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ask(tree: Path, tmp_path: Path, nemotron: Nemotron) -> Ask:
    """The command, with a ledger of its own and a profile `here`."""
    profile_file(Path("profiles"), "here", {"executor": "local"})
    return lambda *words: nemotron(*words, NEMOTRON_STATE_DIR=str(tmp_path / "state"))


def points(ask: Ask) -> list[dict[str, Any]]:
    found = json.loads(ask("jobs", "status", "last", "--json").stdout)
    return sorted(found if isinstance(found, list) else [found], key=lambda row: row["point"])


def until_over(ask: Ask) -> list[dict[str, Any]]:
    end = time.monotonic() + 60
    while any(row["state"] in ("submitting", "pending", "running") for row in points(ask)):
        assert time.monotonic() < end, points(ask)
    return points(ask)


def test_points_run_one_after_another_and_the_first_failure_is_the_exit_code(ask: Ask) -> None:
    done = ask("steps", "run", "small", "--sweep", "exit=0,3,4")
    assert done.returncode == 3, done.stderr
    rows = points(ask)
    assert [(row["state"], row["exit_code"]) for row in rows] == [("finished", 0), ("failed", 3), ("failed", 4)]
    assert [row["run_id"] for row in rows] == [f"{rows[0]['sweep']}.{n}" for n in range(3)]
    spans = [(row["started"], row["ended"]) for row in rows]
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
    for n in (0, 3, 4):
        assert json.loads(Path(f"out/sft/exit={n}/seen.json").read_text())["config"]["exit"] == n


def test_several_points_run_at_once(ask: Ask) -> None:
    """Each waits until it is asked to stop, so that all are there at once only if none waits for another."""
    done = ask(
        "steps", "run", "small", "--sweep", "+env_vars.A=1,2,3", "wait=true", "-b", "here", "--max-parallel", "3"
    )
    assert done.returncode == 0, done.stderr
    ready = [Path(f"out/sft/A={n}/ready") for n in (1, 2, 3)]
    end = time.monotonic() + 60
    while not all(path.exists() for path in ready):
        assert time.monotonic() < end, ask("jobs", "status", "last").stdout
        time.sleep(0.05)
    assert ask("jobs", "cancel", "last").returncode == 0
    assert {row["state"] for row in until_over(ask)} == {"cancelled"}


def test_failed_points_are_submitted_again_alone(ask: Ask) -> None:
    assert ask("steps", "run", "small", "--sweep", "exit=0,5,6", "-b", "here").returncode == 0
    first = until_over(ask)
    assert [row["state"] for row in first] == ["finished", "failed", "failed"]
    again = ask("jobs", "resubmit", "last")
    assert again.returncode == 0, again.stderr
    second = until_over(ask)
    assert second[0] == first[0]
    for n in (1, 2):
        assert second[n]["state"] == "failed" and second[n]["started"] > first[n]["started"]
        assert len(list(Path(second[n]["state_dir"], "logs").iterdir())) == 2
    assert second[1]["ended"] <= second[2]["started"]  # still one after another


def test_a_point_that_is_wrong_leaves_nothing_behind(ask: Ask, tmp_path: Path) -> None:
    done = ask("steps", "run", "small", "--sweep", "exit=0,x", "-b", "here")
    assert done.returncode == 2 and "1 of 2 points are wrong; nothing was submitted" in done.stderr
    assert not Path(".nemotron").exists() and not (tmp_path / "state" / "runs").exists()


def test_an_input_that_all_points_lack_is_made_once_and_first(ask: Ask) -> None:
    done = ask("steps", "run", "pairs", "-c", "tiny", "--sweep", "exit=0,3")
    assert done.returncode == 3 and done.stderr.count("running sft/small -c tiny first") == 1, done.stderr
    runs = json.loads(ask("jobs", "list", "--json").stdout)
    assert sorted((row["step"], row["state"]) for row in runs) == [
        ("rl/pairs", "failed"), ("rl/pairs", "finished"), ("sft/small", "finished")
    ]  # fmt: skip
