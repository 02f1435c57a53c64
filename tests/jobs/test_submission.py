"""Submission, with its client killed at every step of it: one job at most, a true ledger, and a run that can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_launch.backends.live import Refused, Submission
from nemotron_launch.backends.local_client import LocalClient
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Unreachable, Upload
from nemotron_launch.jobs.actions import resubmit
from nemotron_launch.jobs.ledger import Ledger, RunExists
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends, settle
from nemotron_launch.jobs.status import refresh
from nemotron_launch.jobs.submission import check_after, kept, secret_files, submit
from tests.deaths import DIES
from tests.jobs.rows import row
from tests.step_trees import REPOSITORY

# Where the client dies: a function that it is about to call, or has just called.
POINTS = [
    ("before", "nemotron_launch.jobs.submission._keep_apart"),
    ("after", "nemotron_launch.jobs.submission._keep_apart"),
    ("before", "nemotron_launch.jobs.submission._keep"),
    ("after", "nemotron_launch.jobs.submission._keep"),
    ("before", "nemotron_launch.jobs.submission.place"),
    ("before", "nemotron_launch.hosts.here.Here.put"),
    ("after", "nemotron_launch.hosts.here.Here.put"),
    ("before", "nemotron_launch.backends.local_client._start"),
    ("after", "nemotron_launch.backends.local_client._start"),
    ("before", "nemotron_launch.jobs.submission.settled"),
    ("after", "nemotron_launch.jobs.submission.settled"),
]
CLIENT = (
    DIES
    + """
from pathlib import Path
from nemotron_launch.hosts import Upload
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.submission import submit
from tests.jobs.rows import row
folder = Path(sys.argv[1])
with Ledger(folder / "state") as ledger:
    submit(ledger, row(folder=folder), [Upload("run.sh", b"echo once >> ran")])
"""
)


def wait(ledger: Ledger, backends: Backends, run: Run) -> Run:
    import time

    end = time.monotonic() + 60
    while (now := refresh(ledger, backends, [run], fail)[0].run).state in ("pending", "running"):
        assert time.monotonic() < end, now
        time.sleep(0.1)
        run = now
    return now


def fail(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("when", "where"), POINTS, ids=[f"{when} {where.rpartition('.')[2]}" for when, where in POINTS]
)
def test_a_client_killed_while_it_submits_leaves_one_run_or_one_that_can_be_submitted(
    tmp_path: Path, when: str, where: str
) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", CLIENT, when, where, str(tmp_path)], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with Ledger(tmp_path / "state") as ledger, Backends() as backends:
        settle(ledger, backends, fail)
        run = ledger.get("a-run")
        if run is None:  # died before there was a row: the same id is free
            assert where.endswith(("_keep_apart", "_keep"))
            [run] = submit(ledger, row(folder=tmp_path), [Upload("run.sh", b"echo once >> ran")])
        elif run.state == "refused":
            assert run.reason == "its client ended before it was submitted"
            [run] = resubmit(ledger, backends, [run])
        assert run.state == "pending" and run.job_id
        assert wait(ledger, backends, run).state == "finished"
        assert (tmp_path / "ran").read_text() == "once\n"
        settle(ledger, backends, fail)
        assert [(one.run_id, one.state) for one in ledger.runs()] == [("a-run", "finished")]


class Stub(LocalClient):
    """An executor that does as it is told."""

    def __init__(self, error: UserError | None = None) -> None:
        super().__init__()
        self.error = error
        self.files: list[Upload] = []

    def submit(self, run: Run, files: object, *, after: object = ()) -> Submission:
        self.files = list(files)  # type: ignore[call-overload]
        if self.error:
            raise self.error
        return Submission("41")


def test_what_the_executor_refuses_is_a_row_that_says_why(tmp_path: Path) -> None:
    error = Refused("Invalid partition", hint="the profile's partition", exit_code=1)
    with Ledger(tmp_path) as ledger:
        with pytest.raises(Refused) as said:
            submit(ledger, row(), [], backend=Stub(error))
        assert str(said.value) == (
            "error: Invalid partition\n       the profile's partition\n"
            "       when that is put right:  nemotron jobs resubmit a-run"
        )
        [run] = ledger.runs()
        assert (run.state, run.reason, run.job_id) == ("refused", "Invalid partition", "")


def test_an_answer_that_is_lost_leaves_the_row_open_for_the_next_command(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger, Backends() as backends:
        with pytest.raises(Unreachable):
            submit(ledger, row(folder=tmp_path), [], backend=Stub(Unreachable("cut", exit_code=1)))
        assert ledger.runs()[0].state == "submitting"
        settle(ledger, backends, fail)
        assert ledger.runs()[0].state == "submitting"  # this process lives, and may still be at it
        ledger.change(ledger.runs()[0], submitter="")
        settle(ledger, backends, fail)
        assert ledger.runs()[0].state == "refused"


def test_a_taken_id_changes_nothing_of_the_run_that_has_it(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        submit(ledger, row(), [Upload("run.sh", b"first")], backend=Stub())
        with pytest.raises(RunExists):
            submit(ledger, row(), [Upload("run.sh", b"second")], backend=Stub())
        assert [file.data for file in kept(tmp_path, "a-run")] == [b"first"]
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {"a-run"}


def test_kept_files_are_private_share_their_bundle_and_hold_no_secret(tmp_path: Path) -> None:
    secrets = {"TOKEN": {"source": "MY_TOKEN", "optional": False}}
    files = [Upload("job.sbatch", b"true"), Upload("code-1.tar.gz", b"code")]
    backend = Stub()
    with Ledger(tmp_path) as ledger:
        for name in ("one", "two"):
            run = row(name, executor="slurm", secrets=secrets)
            submit(ledger, run, files, backend=backend, env={"MY_TOKEN": "hush ' hush"})
    sent = {file.path: file for file in backend.files}
    assert sent["secrets.env"].mode == 0o600 and b"TOKEN='hush '\"'\"' hush'" in sent["secrets.env"].data
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(b"hush" not in path.read_bytes() for path in paths)
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths)
    assert (tmp_path / "runs/one/code-1.tar.gz").samefile(tmp_path / "runs/two/code-1.tar.gz")


def test_an_optional_secret_may_be_missing_and_another_may_not() -> None:
    secrets = {"A": {"source": "A", "optional": True}, "B": {"source": "MY_B", "optional": False}}
    with pytest.raises(UserError, match="the secret B is not set: there is no MY_B"):
        secret_files(row(executor="slurm", secrets=secrets), {})
    [file] = secret_files(row(executor="slurm", secrets=secrets), {"MY_B": "b"})
    assert file.data == b"export B=b\n"


def test_a_run_waits_only_for_what_can_still_finish_in_the_same_place() -> None:
    run = row("later")
    done, live = row("done", state="finished"), row("live", state="running")
    assert check_after(run, [done, live]) == [live]
    with pytest.raises(UserError, match="bad is failed: a run after it would never start"):
        check_after(run, [row("bad", state="failed")])
    with pytest.raises(UserError, match="away runs elsewhere"):
        check_after(run, [replace(live, run_id="away", contact={"host": "there"})])
