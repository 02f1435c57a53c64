"""Pipelines that run, through the real command: in order, resumed where they ended, never twice at once."""

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

from tests.conftest import Nemotron
from tests.pipelines.small_pipeline import THREE
from tests.sites import LEPTON, SLURM, profile_file

WAIT = 60.0
NAMES = ("first", "second", "third")


def until(holds: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + WAIT
    while not (value := holds()):
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.05)
    return value


def pids() -> dict[str, int]:
    """The process that made what each stage's folder holds."""
    found = {}
    for name in NAMES:
        path = Path(f"out/three/{name}/checkpoints/step_1/training_info.json")
        if path.exists():
            found[name] = json.loads(path.read_text())["pid"]
    return found


def stages(nemotron: Nemotron, *words: str) -> dict[str, dict[str, Any]]:
    done = nemotron("pipeline", "status", "three.yaml", *words, "--json")
    assert done.returncode == 0, done.stderr
    return {one["stage"]: one for one in json.loads(done.stdout)}


def states(nemotron: Nemotron, *words: str) -> list[str]:
    return [one["state"] for one in stages(nemotron, *words).values()]


@pytest.fixture
def run(three: Path, nemotron: Nemotron) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """`nemotron pipeline run three.yaml …`; what a failed test leaves at work is ended."""
    yield lambda *words, **env: nemotron("pipeline", "run", "three.yaml", *words, **env)
    for claim in Path(".nemotron/runs").glob("*/claim"):
        pid = int(claim.read_text().rsplit(":", 2)[1])
        if pid != os.getpid() and b"nemotron_launch" in _command(pid):
            os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_stages_run_in_order_each_on_what_the_one_before_left(run: Run, nemotron: Nemotron) -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("nemotron: stage")] == [
        "nemotron: stage 1 of 3, first: sft/small -c tiny",
        "nemotron: stage 2 of 3, second: rl/pairs -c tiny",
        "nemotron: stage 3 of 3, third: sft/small -c default",
    ]
    seen = json.loads(Path("out/three/third/seen.json").read_text())
    assert seen["config"]["checkpointing"]["pretrained"] == "out/three/second/checkpoints"
    found = stages(nemotron)
    assert [(one["state"], one["run_state"]) for one in found.values()] == [("done", "finished")] * 3
    assert found["second"]["outputs"] == {"checkpointing.checkpoint_dir": "out/three/second/checkpoints"}
    assert found["second"]["after"] == ["first"]
    text = nemotron("pipeline", "status", "three.yaml").stdout.splitlines()
    assert text[0].split() == ["STAGE", "STEP", "STATE", "RUN", "OUTPUT"] and text[1].startswith("first ")


def test_what_is_done_does_not_run_again(run: Run) -> None:
    run()
    before = pids()
    again = run()
    assert again.returncode == 0
    assert again.stderr.splitlines() == [f"nemotron: {name} is done: out/three/{name}" for name in NAMES]
    assert pids() == before


def test_a_stage_that_fails_ends_the_pipeline_and_the_same_command_goes_on_from_it(
    run: Run, nemotron: Nemotron, three: Path
) -> None:
    old = "overrides: [data.path=rows.jsonl]\n  - name: first"
    new = old.replace("jsonl]", "jsonl, '++exit=${oc.decode:${oc.env:CODE,0}}']")
    three.write_text(THREE.replace(old, new))
    failed = run(CODE="3")
    assert failed.returncode == 3
    assert failed.stderr.splitlines()[-1] == (
        "nemotron: second ended with exit code 3; not started: third; the same command goes on from there"
    )
    first = pids()["first"]
    done = run()
    assert done.returncode == 0, done.stderr
    assert pids()["first"] == first and list(pids()) == list(NAMES)


def test_a_stage_that_was_killed_goes_on_in_its_folder(run: Run, nemotron: Nemotron) -> None:
    """The trainer saves in it, and resumes from it."""
    command = [sys.executable, "-m", "nemotron_launch", "pipeline", "run", "three.yaml", "second.wait=true"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        until(lambda: Path("out/three/second/ready").exists(), "the second stage at work")
        child.kill()
        child.wait()
    assert stages(nemotron, "second.wait=true")["second"]["state"] == "to do"
    Path("out/three/second/ready").rename("out/three/second/kept")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        until(lambda: Path("out/three/second/ready").exists(), "the second stage, at work again")
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=WAIT)
    assert child.returncode == 85, errors
    assert "first is done" in errors and "second: rl/pairs -c tiny, goes on: it was lost" in errors
    assert json.loads(Path("out/three/second/asked.json").read_text()) == [signal.SIGINT]
    assert Path("out/three/second/kept").exists() and not Path("out/three/third").exists()


def test_a_changed_config_runs_that_stage_and_those_behind_it_again_and_keeps_what_was_there(run: Run) -> None:
    run()
    before = pids()
    done = run("second.env_vars={A: 1}")
    assert done.returncode == 0, done.stderr
    after = pids()
    assert after["first"] == before["first"]
    assert after["second"] != before["second"] and after["third"] != before["third"]
    assert (
        "second: rl/pairs -c tiny, again: its config has changed; what it left is in out/three/second.1" in done.stderr
    )
    assert (
        "third: sft/small -c default, again: second runs before it; what it left is in out/three/third.1" in done.stderr
    )
    assert Path("out/three/second.1/seen.json").exists()


def test_a_changed_input_runs_the_stage_again(run: Run) -> None:
    run()
    before = pids()
    Path("rows.jsonl").write_text("{}\n{}\n")
    done = run()
    assert "first: sft/small -c tiny, again: " in done.stderr and "rows.jsonl has changed" in done.stderr
    assert not set(before.values()) & set(pids().values())


def test_a_stage_that_was_run_by_hand_since_makes_those_behind_it_run_again(run: Run, nemotron: Nemotron) -> None:
    run()
    before = pids()
    record = Path("out/three/first/artifacts.json")
    record.write_text(record.read_text() + "\n")  # another one, as each run's is
    done = run()
    assert (
        "first is done" in done.stderr and "second: rl/pairs -c tiny, again: what first made has changed" in done.stderr
    )
    assert pids()["first"] == before["first"] and pids()["third"] != before["third"]


def test_results_that_are_gone_are_made_again(run: Run) -> None:
    run()
    subprocess.run(["rm", "-r", "out/three/second/checkpoints"], check=True)
    done = run()
    assert done.returncode == 0 and "second: rl/pairs -c tiny, again: what it made is gone" in done.stderr
    assert list(pids()) == list(NAMES)


def test_from_and_until_choose_stages(run: Run, nemotron: Nemotron) -> None:
    assert run("--until", "second").returncode == 0
    assert list(pids()) == ["first", "second"]
    run()
    before = pids()
    done = run("--from", "second", "--until", "second")
    assert done.returncode == 0, done.stderr
    after = pids()
    assert (after["first"], after["third"]) == (before["first"], before["third"]) and after["second"] != before[
        "second"
    ]
    assert states(nemotron) == ["done", "done", "to do"]
    assert run("--from", "third", "--until", "first").stderr.startswith("error: --until: first does not need third")
    assert run("--from", "thrid").stderr == "error: --from: three has no stage thrid\n       did you mean third?\n"


def test_from_a_stage_whose_needs_are_not_done_is_refused(run: Run) -> None:
    done = run("--from", "second")
    assert done.returncode == 2
    assert done.stderr.startswith("error: three.yaml:12: stage second: needs first, which is not done\n")
    assert not Path("out").exists()


def test_nothing_runs_when_something_is_missing_at_the_end(run: Run, three: Path) -> None:
    three.write_text(THREE.replace("data.path=rows.jsonl", "data.path=nope.jsonl", 1))
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: three.yaml:8: stage third: data.path: there is no file nope.jsonl\n")
    assert not Path("out").exists()


def test_a_missing_secret_is_said_before_anything_runs(run: Run, three: Path, tmp_path: Path) -> None:
    profile_file(tmp_path / "profiles", "mine", {"executor": "local", "secrets": ["MY_TOKEN"]})
    three.write_text(THREE.replace("step: rl/pairs", f"step: rl/pairs\n    profile: {tmp_path}/profiles/mine.yaml"))
    done = run()
    assert done.returncode == 2
    assert "stage second: the secret MY_TOKEN is not set" in done.stderr
    assert not Path("out").exists()


def test_two_at_once_are_refused(run: Run, nemotron: Nemotron) -> None:
    command = [sys.executable, "-m", "nemotron_launch", "pipeline", "run", "three.yaml", "first.wait=true"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
        until(lambda: Path("out/three/first/ready").exists(), "the first stage at work")
        assert stages(nemotron, "first.wait=true")["first"]["state"] == "running"
        other = run("first.wait=true")
        child.send_signal(signal.SIGTERM)
    assert other.returncode == 1
    assert other.stderr == (
        "error: three is being run in out/three already\n"
        "       how its stages are:  nemotron pipeline status three.yaml\n"
    )
    assert child.returncode == 85


# Submitted.


def test_submitted_stages_wait_for_each_other_and_are_not_submitted_twice(run: Run, nemotron: Nemotron) -> None:
    done = run("-b", "local", "first.wait=true", "--json")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)
    assert [(job["stage"], job["after"]) for job in jobs] == [
        ("first", []), ("second", [jobs[0]["run_id"]]), ("third", [jobs[1]["run_id"]])
    ]  # fmt: skip
    assert [job["run_id"].rsplit("-", 3)[1:3] for job in jobs] == [["three", name] for name in NAMES]
    until(lambda: Path("out/three/first/ready").exists(), "the first stage at work")
    assert states(nemotron, "first.wait=true") == ["running", "pending", "pending"]
    again = json.loads(run("-b", "local", "first.wait=true", "--json").stdout)
    assert [job["run_id"] for job in again] == [job["run_id"] for job in jobs]
    other = run("-b", "local")
    assert other.returncode == 2
    assert other.stderr.startswith("error: stage first is running with another config: ")
    assert nemotron("jobs", "cancel", jobs[0]["run_id"]).returncode == 0
    nemotron("jobs", "wait", jobs[2]["run_id"])
    assert states(nemotron, "first.wait=true") == ["to do"] * 3
    assert list(pids()) == []


def test_attached_stages_of_a_profile_run_here_and_warn_nobody(run: Run, nemotron: Nemotron) -> None:
    done = run("-r", "local")
    assert done.returncode == 0, done.stderr
    assert states(nemotron) == ["done"] * 3
    assert all(one["profile"] == "local" for one in stages(nemotron).values())


def test_what_runs_in_the_background_is_followed_by_an_attached_one(run: Run, nemotron: Nemotron) -> None:
    assert run("-b", "local", "--until", "second").returncode == 0
    done = run("-r", "local")
    assert done.returncode == 0, done.stderr
    assert list(pids()) == list(NAMES)


def test_executors_that_cannot_wait_for_each_other_are_refused(run: Run, three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    profile_file(folder, "slurm", {**SLURM, "account": "me"}, remote_job_dir=str(Path.cwd()))
    profile_file(folder, "lepton", LEPTON)
    three.write_text(THREE.replace("step: rl/pairs", "step: rl/pairs\n    profile: slurm"))
    done = run("-b", "local", "--profiles", str(folder))
    assert done.returncode == 2
    assert done.stderr == (
        "error: three.yaml:11: stage second: runs by slurm (this machine) and needs first, by local (this machine): "
        "neither can wait for the other\n       -r in place of -b stays here and runs one after the other\n"
    )
    three.write_text(THREE)
    done = run("-b", "lepton", "--profiles", str(folder), LEPTON_WORKSPACE_ID="w")
    assert done.returncode == 2 and "Lepton's jobs cannot wait for another one" in done.stderr
    assert not Path("out").exists()


# Before.


def test_a_dry_run_prints_every_job_as_it_would_be_submitted(run: Run, nemotron: Nemotron, tmp_path: Path) -> None:
    shown = run("-d", "-b", "local")
    assert shown.returncode == 0, shown.stderr
    assert run("-d", "-b", "local").stdout == shown.stdout
    written = run("-d", "-b", "local", "--output", f"dir={tmp_path}/jobs")
    assert written.stderr.endswith("a folder for each stage\n")
    scripts = [(tmp_path / "jobs" / name / "run.sh").read_text() for name in NAMES]
    heads = [line for line in shown.stdout.splitlines() if line.startswith("# stage ")]
    assert heads == [
        "# stage 1 of 3, first: sft/small -c tiny",
        "# stage 2 of 3, second: rl/pairs -c tiny, after first",
        "# stage 3 of 3, third: sft/small -c default, after second",
    ]
    assert shown.stdout == "".join(f"{head}\n{script}" for head, script in zip(heads, scripts, strict=True))
    data = json.loads(run("-d", "-b", "local", "--output", "json", "--from", "second").stdout)
    assert [(one["stage"], one["after"]) for one in data["stages"]] == [("second", ["first"]), ("third", ["second"])]
    # The same files as the step alone has with the same overrides.
    words = ["output_dir=out/three/second", "checkpointing.pretrained=out/three/first/checkpoints"]
    alone = nemotron("steps", "run", "rl/pairs", "-c", "tiny", "-b", "local", "-d", *words, "data.path=rows.jsonl")
    assert alone.stdout == scripts[1]
    assert not Path("out").exists() and not Path(".nemotron").exists()


def test_what_a_pipeline_is_asked_wrongly_is_said(run: Run) -> None:
    assert "-r and -b exclude each other" in run("-r", "local", "-b", "local").stderr
    assert "--output goes with -d" in run("--output", "json").stderr
    assert "--json goes with -b" in run("--json").stderr
    assert "takes no arguments behind --" in run("--", "x").stderr
