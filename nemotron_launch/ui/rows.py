"""The list of runs for the page: read from the ledger when it has changed, told as what is new since the last time."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.jobs.ledger import FILE, Ledger, state_folder
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.run_folder import Progress
from nemotron_launch.reports.run_data import flat_config

_SETTLED = 2.0  # seconds after which a change of a file that was missed would have another time
_SHOWN = (
    "run_id", "step", "config", "profile", "executor", "host", "state", "reason", "exit_code", "attempt", "created",
    "submitted", "started", "ended", "sweep", "point", "overrides", "job_id",
)  # fmt: skip
_NUMBERS = ("train/loss", "train/reward", "validation/loss", "validation/accuracy")
Row = dict[str, Any]


class Rows:
    """The runs, newest first, each with the number of the change that made it what it is. For many threads.

    `problem`: what the ledger cannot be read for, in words; what was known before is kept.
    """

    def __init__(self) -> None:
        self.folder = state_folder()
        self._path = self.folder / FILE
        self._lock = threading.Lock()
        self._seen: object = None  # of the ledger, when it was read
        self._rows: dict[str, tuple[int, Row]] = {}
        self._progress: dict[str, Row] = {}
        self._order: list[str] = []
        self._gone: list[tuple[int, str]] = []
        self.change = 0
        self.problem = ""
        self.runs: dict[str, Run] = {}

    def since(self, change: int) -> Row:
        """What is another than after that change: rows, ids that are gone, the order where it is another.

        0: everything.
        """
        self._read()
        with self._lock:
            rows = [row for at, row in map(self._rows.__getitem__, self._order) if at > change]
            gone = [name for at, name in self._gone if at > change] if change else []
            return {"change": self.change, "rows": rows, "gone": gone, "problem": self.problem, "now": time.time()}

    def get(self, run_id: str) -> Run | None:
        self._read()
        return self.runs.get(run_id)

    def points(self, sweep: str) -> list[Run]:
        self._read()
        with self._lock:
            return [run for name in self._order if (run := self.runs[name]).sweep == sweep]

    def tell_progress(self, progress: Mapping[str, Progress]) -> None:
        """How far live runs have come: shown with their rows."""
        with self._lock:
            for run_id, far in progress.items():
                told = _far(far)
                if run_id in self._rows and told and self._progress.get(run_id) != told:
                    self._progress[run_id] = told
                    self.change += 1
                    self._rows[run_id] = (self.change, {**self._rows[run_id][1], "progress": told})

    def _read(self) -> None:
        with self._lock:
            # Before the ledger is opened, for that alone makes and removes its log of writes.
            seen = _stamp(self._path)
            if seen and seen == self._seen:
                return
            try:
                with Ledger(self._path.parent) as ledger:
                    runs = ledger.runs()
            except UserError as error:
                self._seen, self.problem = None, str(error).removeprefix("error: ")
                return
            self._seen, self.problem = seen, ""
            self._take(runs)

    def _take(self, runs: Sequence[Run]) -> None:
        now = {run.run_id: run for run in runs}
        change = self.change + 1
        self._gone += [(change, name) for name in self.runs if name not in now]
        changed = any(name not in now for name in self.runs)
        for run_id, run in now.items():
            if self.runs.get(run_id) == run:
                continue
            changed = True
            row = {name: getattr(run, name) for name in _SHOWN} | {"overrides": [_masked(one) for one in run.overrides]}
            if run_id in self._progress:
                row["progress"] = self._progress[run_id]
            self._rows[run_id] = (change, row)
        for name in self.runs.keys() - now.keys():
            del self._rows[name]
            self._progress.pop(name, None)
        self.runs, self._order = now, list(now)
        self.change = change if changed else self.change


def _masked(override: str) -> str:
    """An override as reports show it: without the secret that its key says it is."""
    key, equals, value = override.partition("=")
    return f"{key}={flat_config({key: value})[key]}" if equals else override


def _stamp(ledger: Path) -> object:
    """What is another when the ledger is; None while that is not sure."""
    found = []
    for path in (ledger, ledger.with_name(f"{FILE}-wal")):
        try:
            stat = path.stat()
        except OSError:
            continue
        if time.time() - stat.st_mtime < _SETTLED:
            return None
        found.append((path.name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)


def _far(progress: Progress) -> Row:
    """The step, and the first of a few numbers that a person asks for."""
    metrics = progress.metrics
    numbers = {key: metrics[key] for key in _NUMBERS if isinstance(metrics.get(key), int | float)}
    return {"step": progress.step, **numbers} if progress.step is not None else {}
