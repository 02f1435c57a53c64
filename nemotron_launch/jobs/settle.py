"""Makes the ledger true again: runs whose client died while it submitted them, and runs that wait for a successor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from nemotron_launch.backends.live import Backend, open_backend
from nemotron_launch.hosts import Unreachable
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.process import alive, identity
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.submission import settled, whole

_UNASKABLE = 600.0  # seconds after which a client on another machine, which cannot be asked, counts as dead
Warn = Callable[[str], None]


class Backends:
    """The executors of a command, each opened once, whatever the number of its runs. A context manager."""

    def __init__(self) -> None:
        self._open: dict[str, Backend] = {}

    def of(self, run: Run) -> Backend:
        """The backend of a run's executor and contact."""
        key = _place(run)
        if key not in self._open:
            self._open[key] = open_backend(run.executor, run.contact)
        return self._open[key]

    def groups(self, runs: Iterable[Run]) -> list[list[Run]]:
        """Runs that share a backend, together."""
        found: dict[str, list[Run]] = {}
        for run in runs:
            found.setdefault(_place(run), []).append(run)
        return list(found.values())

    def close(self) -> None:
        for backend in self._open.values():
            backend.close()
        self._open.clear()

    def __enter__(self) -> Backends:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def settle(ledger: Ledger, backends: Backends, warn: Warn) -> None:
    """Find out what became of the runs that a dead client was submitting. Cheap when there are none.

    An executor that is out of reach is a warning: the next command tries again.
    """
    left = [run for run in ledger.runs(states={"submitting"}) if _left_alone(run)]
    for group in backends.groups(left):
        for rows in _by_submission(group):
            try:
                with only_one(ledger, f"settle {whole(rows[0]).run_id}") as ours:
                    still = [run for run in rows if ledger.get(run.run_id) == run]
                    if ours and still:
                        _settle(ledger, backends.of(still[0]), still)
            except Unreachable as error:
                warn(f"{whole(rows[0]).run_id} may or may not have been submitted: {error.message}")
                break


def _settle(ledger: Ledger, backend: Backend, rows: Sequence[Run]) -> None:
    found = backend.find(whole(rows[0]))
    if found:
        settled(ledger, rows, found.job_id, found.cluster)
        return
    reason = "its client ended before it was submitted"
    changes = {"state": "refused", "reason": reason, "ended": time.time()}
    ledger.change_all([(row, dict(changes)) for row in rows])


@contextmanager
def only_one(ledger: Ledger, name: str) -> Iterator[bool]:
    """Whether this process, of all that try, is the one that does something."""
    with ledger.lock(name, identity(), lambda holder: alive(holder) is not False) as ours:
        yield ours


def _left_alone(run: Run) -> bool:
    lives = alive(run.submitter)
    return not lives if lives is not None else time.time() - run.created > _UNASKABLE


def _by_submission(runs: Iterable[Run]) -> list[list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.sweep or run.run_id, []).append(run)
    return list(found.values())


def _place(run: Run) -> str:
    return json.dumps([run.executor, dict(run.contact)], sort_keys=True, default=str)
