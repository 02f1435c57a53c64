"""Runs on this machine in the background, through the real commands: they outlive their client and obey it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.backends.local_client import LocalClient
from nemotron_launch.hosts import Upload
from nemotron_launch.jobs import submission
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run
from tests.conftest import Nemotron
from tests.jobs.rows import row

WAIT = 60.0
SFT = ("steps", "run", "sft/small", "data.path=rows.jsonl")


@pytest.fixture
def state(tree: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of the ledger; what a failed test leaves at work is ended."""
    Path("rows.jsonl").write_text("{}\n")
    yield tmp_path / "state"
    for claim in Path(".nemotron/runs").glob("**/claim"):
        pid = int(claim.read_text().rsplit(":", 2)[1])
        if pid != os.getpid() and b"local_supervisor" in _command(pid):
            os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(holds: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + WAIT
    while not (value := holds()):
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.05)
    return value


def submit(nemotron: Nemotron, *more: str, **env: str) -> dict[str, Any]:
    done = nemotron(*SFT, "-b", "local", "--json", *more, **env)
    assert done.returncode == 0, done.stderr
    run: dict[str, Any] = json.loads(done.stdout)
    return run


def shown(nemotron: Nemotron, name: str = "last") -> dict[str, Any]:
    done = nemotron("jobs", "status", name, "--json")
    assert done.returncode == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def test_a_run_goes_on_after_its_client_and_ends_with_its_own_exit_code(state: Path, nemotron: Nemotron) -> None:
    run = submit(nemotron, "exit=7")
    assert run["state"] == "pending" and run["run_dir"].startswith(str(Path.cwd()))
    done = nemotron("jobs", "wait", run["run_id"])
    assert done.returncode == 7, done.stderr
    seen = shown(nemotron, run["run_id"][:-2])
    assert (seen["state"], seen["exit_code"], seen["last_checkpoint"]) == ("failed", 7, 1)
    assert [attempt["exit_code"] for attempt in seen["attempts"]] == [7]
    assert (Path(run["run_dir"]) / "exit_code").read_text() == "7\n"
    assert nemotron("jobs", "attach", "last").returncode == 7


def test_what_comes_next_is_printed(state: Path, nemotron: Nemotron) -> None:
    done = nemotron(*SFT, "-b", "local", "--run-id", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine: sft/small -c default, in the background here, process ")
    assert "nemotron jobs logs mine -f\n" in done.stdout and "nemotron jobs cancel mine\n" in done.stdout
    assert nemotron("jobs", "wait", "mine", "-q").returncode == 0


def test_the_same_run_id_is_submitted_once(state: Path, nemotron: Nemotron) -> None:
    submit(nemotron, "--run-id", "mine")
    again = nemotron(*SFT, "-b", "local", "--run-id", "mine")
    assert (again.returncode, again.stderr) == (
        2,
        "error: there is a run mine already\n       nemotron jobs status mine\n",
    )


def test_cancel_lets_the_trainer_save_and_resubmit_lets_it_go_on(state: Path, nemotron: Nemotron) -> None:
    run = submit(nemotron, "wait=true")
    until(lambda: Path("out/sft/ready").exists(), "a run at work")
    assert shown(nemotron)["state"] == "running"
    refused = nemotron("jobs", "resubmit", "last")
    assert refused.stderr.startswith(f"error: {run['run_id']} is running\n       end it first:")
    done = nemotron("jobs", "cancel", "last")
    assert done.stdout == f"{run['run_id']}: is ending\n"
    assert nemotron("jobs", "wait", "last").returncode == 130
    assert json.loads(Path("out/sft/asked.json").read_text()) == [signal.SIGTERM]
    seen = shown(nemotron)
    assert (seen["state"], seen["exit_code"]) == ("cancelled", 85)
    assert nemotron("jobs", "cancel", "last").stdout.endswith(": was over already, cancelled\n")

    Path("out/sft/ready").unlink()
    assert nemotron("jobs", "resubmit", "last").returncode == 0
    until(lambda: Path("out/sft/ready").exists(), "the run, at work again")
    again = shown(nemotron)
    assert again["state"] == "running" and again["job_id"] != seen["job_id"]
    assert [attempt["number"] for attempt in again["attempts"]] == [0, 1]
    nemotron("jobs", "cancel", "last")
    assert nemotron("jobs", "wait", "last").returncode == 130


def test_a_second_cancel_kills(state: Path, nemotron: Nemotron, tree: Path) -> None:
    script = tree / "sft/small/train.py"
    script.write_text(script.read_text().replace("asked.append(n)", "None"))  # deaf
    submit(nemotron, "wait=true")
    until(lambda: Path("out/sft/ready").exists(), "a run at work")
    nemotron("jobs", "cancel", "last")
    assert shown(nemotron)["state"] == "running"
    nemotron("jobs", "cancel", "last")
    assert nemotron("jobs", "wait", "last").returncode == 130
    assert shown(nemotron)["exit_code"] == 128 + signal.SIGKILL


def test_a_run_can_be_cancelled_at_once(state: Path, nemotron: Nemotron) -> None:
    """Before its supervisor is more than a Python that starts."""
    with Ledger() as ledger:
        [run] = ledgered(ledger, "sleep 60")
        client = LocalClient()
        client.cancel([run])
        until(lambda: client.poll([run])[run.run_id].ended, "its end")
        seen = client.poll([run])[run.run_id]
        assert (seen.state, seen.exit_code) == ("cancelled", 130)


def test_a_run_that_cannot_be_started_says_why(state: Path, tmp_path: Path) -> None:
    with Ledger() as ledger:
        [run] = ledgered(ledger, "true", workdir=str(tmp_path / "gone"))
        client = LocalClient()
        until(lambda: client.poll([run])[run.run_id].ended, "its end")
        seen = client.poll([run])[run.run_id]
        assert seen.state == "failed" and "could not be started: no such file or directory" in seen.reason


def ledgered(ledger: Ledger, script: str, **fields: Any) -> list[Run]:
    """A run of a script, submitted."""
    return submission.submit(ledger, row(folder=Path.cwd(), **fields), [Upload("run.sh", script.encode())])


def test_a_run_that_saved_is_restarted_up_to_max_restarts(state: Path, nemotron: Nemotron) -> None:
    submit(nemotron, "exit=85", "++run.max_restarts=2")
    assert nemotron("jobs", "wait", "last").returncode == 85
    seen = shown(nemotron)
    assert (seen["state"], seen["attempt"]) == ("stopped", 2)
    assert [attempt["exit_code"] for attempt in seen["attempts"]] == [85, 85, 85]
    assert "no restart is left of 2" in seen["reason"]


def test_a_killed_supervisor_takes_its_job_along_and_is_not_taken_for_running(state: Path, nemotron: Nemotron) -> None:
    run = submit(nemotron, "wait=true")
    until(lambda: Path("out/sft/ready").exists(), "a run at work")
    os.kill(int(run["job_id"]), signal.SIGKILL)
    until(lambda: shown(nemotron)["state"] == "lost", "a lost run")
    trainer = f"{run['run_id']}/config.yaml".encode()
    until(lambda: not any(trainer in _command(int(p.name)) for p in Path("/proc").glob("[0-9]*")), "the trainer's end")
    assert nemotron("jobs", "wait", "last").returncode == 1
    Path("out/sft/ready").unlink()
    assert nemotron("jobs", "resubmit", "last").returncode == 0
    until(lambda: Path("out/sft/ready").exists(), "the run, at work again")


def test_a_run_after_another_waits_for_it(state: Path, nemotron: Nemotron) -> None:
    first = submit(nemotron, "wait=true", "--run-id", "first")
    until(lambda: Path("out/sft/ready").exists(), "a run at work")
    submit(nemotron, "output_dir=out/second", "--run-id", "second", "--after", "first")
    waits = shown(nemotron, "second")
    assert (waits["state"], waits["reason"], waits["after"]) == ("pending", "waits for first", ["first"])
    nemotron("jobs", "cancel", first["run_id"])
    assert nemotron("jobs", "wait", "second").returncode == 130
    ended = shown(nemotron, "second")
    assert (ended["state"], ended["reason"]) == ("cancelled", "first, for which it waited, is cancelled")
    done = nemotron(*SFT, "-b", "local", "--after", "first")
    assert done.stderr.startswith("error: first is cancelled: a run after it would never start\n")


def test_steps_that_make_what_is_missing_run_first(state: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "rl/pairs", "-c", "tiny", "data.path=rows.jsonl", "-b", "local")
    assert done.returncode == 0 and "running sft/small -c tiny first" in done.stderr
    first, second = json.loads(nemotron("jobs", "list", "--json").stdout)[::-1]
    assert (first["step"], second["step"], second["after"]) == ("sft/small", "rl/pairs", [first["run_id"]])
    assert nemotron("jobs", "wait", second["run_id"]).returncode == 0
    assert Path("out/sft-tiny/seen.json").stat().st_mtime < Path("out/pairs-tiny/seen.json").stat().st_mtime


def test_logs_are_those_of_the_last_attempt_unless_asked_otherwise(state: Path, nemotron: Nemotron, tree: Path) -> None:
    script = tree / "sft/small/train.py"
    script.write_text(
        'import os\nprint("one\\ntwo", os.environ["NEMOTRON_LOG_DIR"][-1], flush=True)\n' + script.read_text()
    )
    submit(nemotron, "exit=85", "++run.max_restarts=1")
    nemotron("jobs", "wait", "last")
    logs = [line for line in nemotron("jobs", "logs", "last").stdout.splitlines() if not line.startswith("[job] ")]
    assert logs == ["one", "two 1"]
    assert nemotron("jobs", "logs", "last", "--node", "0", "--attempt", "0").stdout == "one\ntwo 0\n"
    assert nemotron("jobs", "logs", "last", "--node", "0", "--tail", "1").stdout == "two 1\n"
    assert "one\ntwo 1\n" in nemotron("jobs", "logs", "last", "-f").stdout
    none = nemotron("jobs", "logs", "last", "--node", "7")
    assert (none.returncode, none.stdout) == (1, "") and "has no such log yet" in none.stderr


def test_a_follower_that_is_interrupted_leaves_the_run_alone(state: Path, nemotron: Nemotron) -> None:
    submit(nemotron, "wait=true")
    until(lambda: Path("out/sft/ready").exists(), "a run at work")
    command = [sys.executable, "-m", "nemotron_launch", "jobs", "attach", "last"]
    for option, end in (["--on-interrupt", "detach"], "running"), (["--on-interrupt", "cancel"], "cancelled"):
        with subprocess.Popen([*command, *option], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr and ": running" in child.stderr.readline()
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=WAIT)
        assert child.returncode == 130, errors
        assert shown(nemotron)["state"] == end
    assert "jobs attach" not in errors


def test_fetch_copies_numbers_and_logs_or_the_newest_checkpoint(
    state: Path, nemotron: Nemotron, tmp_path: Path
) -> None:
    submit(nemotron, "--run-id", "mine")
    nemotron("jobs", "wait", "mine")
    done = nemotron("jobs", "fetch", "mine")
    assert done.returncode == 0, done.stderr
    assert Path("mine/output/metrics.jsonl").read_text() == "{}"
    assert Path("mine/logs/attempt-0/node-0.log").exists()
    assert nemotron("jobs", "fetch", "mine", "--checkpoints", "--to", str(tmp_path / "there")).returncode == 0
    assert (tmp_path / "there/checkpoints/step_1/training_info.json").exists()


def test_prune_forgets_what_is_over_and_never_a_live_run(state: Path, nemotron: Nemotron) -> None:
    done = submit(nemotron, "--run-id", "done")
    nemotron("jobs", "wait", "done")
    live = submit(nemotron, "--run-id", "live", "wait=true", "output_dir=out/live")
    until(lambda: Path("out/live/ready").exists(), "a run at work")
    asked = nemotron("jobs", "prune", "--older-than", "0")
    assert asked.returncode == 2 and asked.stderr.endswith("--yes does it, --dry-run only shows it\n")
    assert nemotron("jobs", "prune", "--older-than", "0", "--yes").stdout.startswith("done  finished  ")
    assert not Path(done["run_dir"]).exists() and not (state / "runs/done").exists()
    assert Path("out/sft/checkpoints/step_1").exists()
    assert Path(live["run_dir"]).exists()
    with Ledger(state) as ledger:
        assert [run.run_id for run in ledger.runs()] == ["live"]


def test_a_run_of_the_terminal_is_in_the_ledger_too(state: Path, nemotron: Nemotron) -> None:
    assert nemotron(*SFT, "exit=3").returncode == 3
    seen = shown(nemotron)
    assert (seen["state"], seen["exit_code"], seen["profile"]) == ("failed", 3, "")
    refused = nemotron("jobs", "resubmit", "last")
    assert refused.returncode == 1 and "run again, goes on from its last checkpoint" in refused.stderr


def test_a_ledger_that_cannot_be_used_warns_here_and_refuses_there(state: Path, nemotron: Nemotron) -> None:
    state.write_text("in the way")
    here = nemotron(*SFT)
    assert here.returncode == 0 and here.stderr.startswith("warning: this run is not recorded: ")
    there = nemotron(*SFT, "-b", "local", "output_dir=out/there")
    assert there.returncode == 1 and "NEMOTRON_STATE_DIR names another folder" in there.stderr
    assert not Path("out/there").exists()


def test_a_secret_that_is_not_set_is_said_before_anything_is_written(state: Path, nemotron: Nemotron) -> None:
    Path("mine.yaml").write_text("executor: local\nsecrets: [MY_TOKEN]\n")
    done = nemotron(*SFT, "-b", "mine.yaml")
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: the secret MY_TOKEN is not set: there is no MY_TOKEN in the environment\n       export MY_TOKEN=…\n"
    )
    assert not Path(".nemotron/runs").exists() and not list(state.glob("runs/*"))
    run = json.loads(nemotron(*SFT, "-b", "mine.yaml", "--json", MY_TOKEN="hush-hush").stdout)
    nemotron("jobs", "wait", "last")
    assert json.loads(Path("out/sft/seen.json").read_text())["env"]["MY_TOKEN"] == "hush-hush"
    for folder in (state, Path(run["run_dir"])):
        for path in folder.rglob("*"):
            assert not path.is_file() or b"hush-hush" not in path.read_bytes(), path
