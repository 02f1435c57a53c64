"""`nemotron jobs`: what it prints, what it asks, and what it says to a name or a word that is wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from nemotron_launch.jobs.ledger import Ledger
from tests.conftest import Nemotron
from tests.hosts.terminal import in_terminal
from tests.jobs.rows import row
from tests.jobs.test_local_runs import SFT, state, until

__all__ = ["state"]

HOSTILE = "a\x1b[2Jb\nc\udc80\u202e"


@pytest.fixture
def ledger(tree: Path) -> Ledger:
    return Ledger()


def test_an_empty_ledger_lists_nothing(tree: Path, nemotron: Nemotron) -> None:
    done = nemotron("jobs", "list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no run matches\n")
    assert json.loads(nemotron("jobs", "list", "--json").stdout) == []


def test_runs_are_listed_newest_first_and_filtered(ledger: Ledger, nemotron: Nemotron) -> None:
    now = time.time()
    ended = {"submitted": now - 90_030, "started": now - 3600, "ended": now - 3510}
    ledger.add([
        row("old", created=now - 90_030, state="finished", job_id="17", **ended),
        row("new", created=now - 7260, state="failed", step="sft/small", profile="site"),
    ])  # fmt: skip
    lines = nemotron("jobs", "list").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["RUN", "STATE", "AGE", "TOOK", "PROFILE", "JOB", "STEP"],
        ["new", "failed", "2h1m", "-", "site", "-", "small", "-c", "tiny"],
        ["old", "finished", "1d1h", "1m30s", "local", "17", "pairs", "-c", "tiny"],
    ]
    for options in (["--state", "failed"], ["--step", "small"], ["--profile", "site"], ["-n", "1"]):
        assert [run["run_id"] for run in json.loads(nemotron("jobs", "list", "--json", *options).stdout)] == ["new"]


def test_what_a_name_holds_does_not_move_the_cursor(ledger: Ledger, nemotron: Nemotron) -> None:
    ledger.add([row("bad", state="failed", profile=HOSTILE, reason=HOSTILE, overrides=(HOSTILE,), output_dir=HOSTILE)])
    for arguments in (["list"], ["status", "bad"]):
        done = nemotron("jobs", *arguments)
        assert done.returncode == 0, done.stderr
        assert "a?[2Jb?c??" in done.stdout and "\x1b" not in done.stdout
    assert json.loads(nemotron("jobs", "status", "bad", "--json").stdout)["reason"] == HOSTILE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nope"], "there is no run 'nope'\n       did you mean no?"),
        (["status"], "missing argument RUN"),
        (["list", "--state", "don"], "--state: 'don' is no state\n       cancelled, failed,"),
        (["wait"], "missing argument RUN..."),
        (["lst"], "nemotron jobs has no command lst\n       did you mean nemotron jobs list?"),
        (["attach", "no", "--on-interrupt", "x"], "invalid value for --on-interrupt"),
        (["shell", "no"], "no is failed: there is nowhere to be"),
        (["fetch", "no"], "no has left nothing yet"),
    ],
)
def test_a_wrong_word_is_one_message(ledger: Ledger, nemotron: Nemotron, arguments: list[str], message: str) -> None:
    ledger.add([row("no", state="failed")])
    done = nemotron("jobs", *arguments)
    assert done.returncode in (1, 2) and not done.stdout
    assert message in done.stderr and done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--after", "x"], "--after goes with -b or -r"),
        (["-r", "local", "--after", "x"], "--after is for runs that are submitted"),
        (["-r", "local", "--on-interrupt", "detach"], "--on-interrupt is for runs that are submitted"),
        (["-b", "local", "--on-interrupt", "detach"], "--on-interrupt goes with -r"),
        (["-r", "local", "--json"], "--json goes with -b"),
        (["-b", "local", "--after", "x"], "there is no run 'x'"),
    ],
)
def test_an_option_out_of_place_is_refused(tree: Path, nemotron: Nemotron, arguments: list[str], message: str) -> None:
    done = nemotron("steps", "run", "sft/small", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_the_shell_completes_runs_newest_first(ledger: Ledger, nemotron: Nemotron) -> None:
    ledger.add([row("alpha", created=1.0), row("almost", created=2.0), row("beta", created=3.0)])
    done = nemotron(_NEMOTRON_COMPLETE="bash_complete", COMP_WORDS="nemotron jobs status al", COMP_CWORD="3")
    assert done.stdout.split() == ["plain,almost", "plain,alpha"]
    done = nemotron(_NEMOTRON_COMPLETE="bash_complete", COMP_WORDS="nemotron jobs wait l", COMP_CWORD="3")
    assert done.stdout.split() == ["plain,last"]


def test_what_has_gone_without_a_trace_is_lost_after_a_while(ledger: Ledger, nemotron: Nemotron) -> None:
    host = os.uname().nodename
    for name, age, where in (("young", 60, host), ("gone", 1000, host), ("away", 1000, "elsewhere")):
        ledger.add([row(name, state="running", submitted=time.time() - age, host=where)])
    states = {run["run_id"]: run["state"] for run in json.loads(nemotron("jobs", "list", "--json").stdout)}
    assert states == {"young": "running", "gone": "lost", "away": "running"}


def test_ctrl_c_asks_what_to_do(state: Path, nemotron: Nemotron) -> None:
    assert nemotron(*SFT, "-b", "local", "--run-id", "mine", "wait=true").returncode == 0
    until(lambda: Path("out/sft/ready").exists(), "a run at work")
    code = "from nemotron_launch.cli.main import main; main(['jobs', 'attach', 'mine'])"
    dialogue = [("running", "\x03"), ("to continue?", "\n"), ("following on", "\x03"), ("to continue?", "d\n")]
    ended, shown = in_terminal(code, dialogue, env={})
    assert ended == 130, shown
    assert "no longer following; the run goes on" in shown and "nemotron jobs attach mine" in shown
    ended, shown = in_terminal(code, [("running", "\x03"), ("to continue?", "c\n")], env={})
    assert ended == 130 and "cancelled" in shown, shown
