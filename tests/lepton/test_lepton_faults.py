"""Every call of a submission, a look and a cancellation fails in every way: one job a run, none lost, a true ledger."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_launch.backends import lepton_client
from nemotron_launch.errors import UserError
from nemotron_launch.jobs.actions import resubmit
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.settle import Backends, settle
from nemotron_launch.jobs.status import look, refresh
from nemotron_launch.jobs.submission import submit
from tests.lepton.lepton_runs import client, fail, hasty, planned, settling, spec_of
from tests.lepton.service import TOKEN, Fault, Service
from tests.step_trees import REPOSITORY

KINDS: tuple[int | str, ...] = (401, 403, 404, 409, 429, 500, 503, "reset", "lost", "cut", "garbage", "drip")
SUBMITTING = ("GET dedicated-node-groups", "GET shapes", "GET jobs", "POST jobs")


@pytest.mark.slow
@pytest.mark.parametrize("call", SUBMITTING)
def test_a_submission_whose_calls_fail_makes_one_job_or_none(
    workspace: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(lepton_client, "open_client", settling)
    with Ledger(tmp_path / "state") as ledger, Backends() as backends:
        for kind in KINDS:
            for times in (1, 100):
                workspace.faults = [Fault(call, kind, times, {"Retry-After": "0"} if kind == 429 else {})]
                name = f"run-{kind}-{times}"
                run, files = planned(tmp_path / "remote", name)
                try:
                    submit(ledger, run, files, backend=hasty(run, kind))
                except UserError as error:
                    assert TOKEN not in str(error)
                workspace.faults = []
                now = ledger.get(name)
                mine = [job for job in workspace.live_jobs() if job.spec["metadata"]["name"] == name]
                if now is None:
                    assert mine == [] and call in SUBMITTING[:2], (kind, times)
                    continue
                if now.state == "submitting":
                    ledger.change(now, submitter="")  # as if its client had ended
                    settle(ledger, backends, fail)
                    now = ledger.get(name)
                assert now and now.state in ("pending", "refused"), (kind, times, now)
                if now.state == "refused":
                    assert mine == [], (kind, times)
                    [now] = resubmit(ledger, backends, [now])
                mine = [job for job in workspace.live_jobs() if job.spec["metadata"]["name"] == name]
                assert [job.id for job in mine] == [now.job_id], (kind, times)


def test_a_failure_that_passes_is_borne_in_silence(workspace: Service, tmp_path: Path) -> None:
    with Ledger(tmp_path / "state") as ledger:
        for call in SUBMITTING:
            for kind in (429, 503, "reset", "lost", "cut", "garbage"):
                workspace.faults = [Fault(call, kind, 1)]
                run, files = planned(tmp_path / "remote", f"run-{kind}-{SUBMITTING.index(call)}")
                if call != "POST jobs" and kind == "garbage":
                    continue
                [now] = submit(ledger, run, files, backend=client(run))
                assert now.state == "pending", (call, kind)
        assert len(workspace.live_jobs()) == len(ledger.runs())


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_that_fails_changes_nothing(workspace: Service, tmp_path: Path, kind: int | str) -> None:
    with Ledger(tmp_path / "state") as ledger:
        run, files = planned(tmp_path / "remote")
        [run] = submit(ledger, run, files, backend=client(run))
        workspace.faults = [Fault("GET job", kind, 100), Fault("GET events", kind, 100)]
        try:
            look(ledger, hasty(run, kind), [run])
        except UserError as error:
            assert TOKEN not in str(error)
        now = ledger.get("a-run")
        assert now and (now.state, now.job_id) == ("pending", run.job_id)
        workspace.faults = []
        assert look(ledger, client(run), [run])[0].run.reason == "in the queue: Unschedulable"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancellation_is_done_or_said_to_have_failed(workspace: Service, tmp_path: Path, kind: int | str) -> None:
    with Ledger(tmp_path / "state") as ledger:
        run, files = planned(tmp_path / "remote")
        [run] = submit(ledger, run, files, backend=client(run))
        workspace.faults = [Fault("PATCH job", kind, 100)]
        try:
            hasty(run, kind).cancel([run])
        except UserError as error:
            assert TOKEN not in str(error)
        else:
            assert kind == 404 or not workspace.live_jobs()  # a job that is gone needs no stopping
        workspace.faults = []
        client(run).cancel([run])
        assert not workspace.live_jobs()
        assert look(ledger, client(run), [run])[0].run.state == "cancelled"
        client(run).cancel([run])  # over already


def test_of_two_jobs_of_one_run_the_first_goes_on(workspace: Service, tmp_path: Path) -> None:
    run, files = planned(tmp_path / "remote")
    spec = spec_of(files)
    first, second = workspace.create(spec), workspace.create(spec)
    second.made += 1
    found = client(run).find(run)
    assert found and found.job_id == first.id
    assert workspace.live_jobs() == [first]


def test_a_run_that_lives_in_another_ledger_is_not_started_twice(workspace: Service, tmp_path: Path) -> None:
    with Ledger(tmp_path / "one") as ledger:
        run, files = planned(tmp_path / "remote")
        submit(ledger, run, files, backend=client(run))
    next(iter(workspace.jobs.values())).made -= 3600
    with Ledger(tmp_path / "two") as ledger:
        run, files = planned(tmp_path / "remote")
        with pytest.raises(UserError, match="a run a-run lives already, as job a-run-"):
            submit(ledger, run, files, backend=client(run))
    assert len(workspace.jobs) == 1


# Clients that are killed ---------------------------------------------------------------------------------------------

CLIENT = """
import os, signal, sys
from pathlib import Path
from nemotron_launch.backends import lepton_api, lepton_client
from nemotron_launch.jobs import submission
from nemotron_launch.jobs.ledger import Ledger
from tests.lepton.lepton_runs import client, planned
when, where, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
owners = {"Api": lepton_api.Api, "LeptonClient": lepton_client.LeptonClient, "submission": submission}
owner = owners[where.split(".")[0]]
real = getattr(owner, where.split(".")[1])
def deadly(*arguments, **more):
    if when == "after":
        real(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, where.split(".")[1], deadly)
run, files = planned(folder / "remote")
with Ledger(folder / "state") as ledger:
    submission.submit(ledger, run, files, backend=client(run))
"""
POINTS = [
    ("before", "submission.place"),
    ("before", "LeptonClient._before"),
    ("before", "Api.create_job"),
    ("after", "Api.create_job"),
    ("before", "submission.settled"),
]


@pytest.mark.parametrize(("when", "where"), POINTS, ids=[" ".join(point) for point in POINTS])
def test_a_client_killed_while_it_submits_is_settled_by_the_next(
    workspace: Service, tmp_path: Path, when: str, where: str
) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", CLIENT, when, where, str(tmp_path)], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    _settled(workspace, tmp_path, made=(when, where) in POINTS[3:])


def test_a_job_that_is_made_after_its_client_died_is_found(workspace: Service, tmp_path: Path) -> None:
    workspace.faults = [Fault("POST jobs", "late")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", CLIENT, "before", "Api.delete_job", str(tmp_path)], env=env)
    end = time.monotonic() + 60
    while "POST jobs" not in workspace.calls:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not workspace.jobs
    _settled(workspace, tmp_path, made=True)


def _settled(workspace: Service, folder: Path, *, made: bool) -> None:
    with Ledger(folder / "state") as ledger, Backends() as backends:
        settle(ledger, backends, fail)
        run = ledger.get("a-run")
        assert run and run.state == ("pending" if made else "refused")
        if not made:
            [run] = resubmit(ledger, backends, [run])
        assert [job.id for job in workspace.live_jobs()] == [run.job_id]
        assert refresh(ledger, backends, [run], fail)[0].run.state == "pending"
