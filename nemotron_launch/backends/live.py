"""What the ledger, following and the `jobs` commands ask of an executor; one module `<executor>_client` each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.hosts import Host, Upload
from nemotron_launch.job import Executor
from nemotron_launch.jobs.run import Run, State

POINTS = "points"  # in the options of a sweep that is submitted again: the numbers of those that are


class Refused(UserError):
    """The executor said no: nothing was submitted."""


@frozen
class Submission:
    """What the executor calls the run now. cluster: of a federation, else empty. notes: worth telling the user."""

    job_id: str
    cluster: str = ""
    notes: tuple[str, ...] = ()


@frozen
class Seen:
    """What the executor and the run's folder say of a run now; fields as in Run. expected_start: of one that waits.

    job_id: the job that carries the run now, where it is another than asked for: a successor has taken over, and the
    ledger follows. wants_successor: its job is over for good (preempted by a site that cancels, its node gone), the run
    is not, and nobody has submitted another job: `submit_successor` does. The run counts as pending meanwhile.
    """

    state: State
    reason: str = ""
    exit_code: int | None = None
    attempt: int = 0
    nodes: tuple[str, ...] = ()
    started: float | None = None
    ended: float | None = None
    expected_start: float | None = None
    job_id: str = ""
    wants_successor: bool = False


@frozen
class LogSource:
    """A log that grows: of one node (or service) in one attempt. key: what the backend finds it by."""

    attempt: int
    name: str  # "node-0", "reward-0", or "job" for the script's own
    key: str


class Backend(Protocol):
    """An executor, reached. Raises hosts.Unreachable when it cannot be reached, Refused when it says no."""

    @property
    def host(self) -> Host | None:
        """Where the run's folder can be read; None where it cannot."""

    def check(self, run: Run, files: Sequence[Upload]) -> tuple[str, ...]:
        """Raise, before anything is written, what submit would be refused for; what is worth telling the user.

        A host that is down, a wrong key or token, what the executor does not have; quick.
        """

    def submit(self, run: Run, files: Sequence[Upload], *, after: Sequence[Run] = ()) -> Submission:
        """Place the files in run.run_dir and submit the run, once: a lost answer is looked up before a second try.

        A run without a point submits its whole script, all points of a sweep, or those in its options under POINTS; a
        point submits itself alone. Unreachable means that the answer is not known: `find` will know it. Refused:
        nothing but the folder is left.
        """

    def find(self, run: Run) -> Submission | None:
        """The job that carries this run's id, if the executor or the run's folder knows one."""

    def poll(self, runs: Sequence[Run]) -> dict[str, Seen]:
        """How these runs are, by run id, in as few calls as can be; a run that nothing is known of is left out."""

    def submit_successor(self, run: Run) -> Submission:
        """Another job for a run that was `seen.wants_successor`; safe when several do it at once: one of them trains.

        run.job_id: the job that is over. Called by whoever polls: the attached client and every `jobs` command. It
        counts as a restart.
        """

    def cancel(self, runs: Sequence[Run]) -> None:
        """End them for good, no requeue. One that is over already is no error."""

    def clear(self, run: Run) -> None:
        """Make the folder of a run that is over ready for another submission (claim and exit code away, logs kept)."""

    def log_sources(self, run: Run) -> list[LogSource]:
        """Its logs so far, oldest attempt first."""

    def read_logs(self, wanted: Mapping[LogSource, int]) -> dict[LogSource, bytes]:
        """What lies behind these offsets (bytes); sources without news are left out."""

    def shell(self, run: Run) -> int:
        """A terminal where the run's first node works, in its container; the exit code."""

    def close(self) -> None: ...


def open_backend(executor: Executor, contact: Mapping[str, Any]) -> Backend:
    """The backend of an executor. contact: Run.contact."""
    backend: Backend = import_module(f"nemotron_launch.backends.{executor}_client").open_client(contact)
    return backend
