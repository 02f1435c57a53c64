"""Looks at runs while somebody looks at their pages: a thread for each executor, however many pages are open.

Requests only read what these threads have found, so a cluster that answers slowly keeps nobody waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from nemotron_launch.backends.live import Backend, LogSource
from nemotron_launch.errors import UserError
from nemotron_launch.jobs.follow import Pace, any_ended
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import LIVE, Run
from nemotron_launch.jobs.run_folder import Progress
from nemotron_launch.jobs.settle import Backends, settle
from nemotron_launch.jobs.status import progress_of, refresh
from nemotron_launch.reports.sources import RunFiles, open_runs, update
from nemotron_launch.ui.log_tails import Tail, chosen, open_tail
from nemotron_launch.ui.rows import Rows

LOOKED_AT = 20.0  # seconds after its last request in which a page counts as open; a hidden one asks no more
_KEPT = 300.0  # seconds for which what was read is kept after that
_AFTER_FAILURE = 2.0  # seconds until the next look
_MOST_PROGRESS = 200  # live runs whose metrics the list shows


class Watched:
    """A run whose page is open: its files and logs, as far as they have been read. Read them where `free` says so."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lock = threading.Lock()
        self.files: RunFiles | None = None
        self.progress: Progress | None = None
        self.nodes: tuple[str, ...] = ()
        self.expected_start: float | None = None
        self.sources: list[LogSource] = []
        self.tails: dict[LogSource, Tail] = {}
        self.problem = ""
        self.warned: tuple[int, list[dict[str, Any]], float] = (-1, [], 0.0)  # at which size of its metrics, and when
        self.asked = 0.0
        self.logs_asked: dict[str, float] = {}
        self.has_files, self.has_logs = threading.Event(), threading.Event()
        self.reading, self.finding, self.logging = Pace(1.0, 5.0), Pace(2.0, 10.0), Pace(0.5, 3.0)

    def open(self) -> bool:
        return time.monotonic() - self.asked < LOOKED_AT

    def wanted_logs(self) -> list[str]:
        return [name for name, asked in list(self.logs_asked.items()) if time.monotonic() - asked < LOOKED_AT]

    @contextmanager
    def free(self, seconds: float) -> Iterator[bool]:
        """Whether its files are not just being read, for as long as this is open; waits so long for that."""
        ours = self.lock.acquire(timeout=max(0.0, seconds))
        try:
            yield ours
        finally:
            if ours:
                self.lock.release()


class Place(threading.Thread):
    """An executor as one contact reaches it, and the runs there that are looked at."""

    def __init__(self, rows: Rows, first: Run) -> None:
        super().__init__(daemon=True, name=f"ui-{first.executor}")
        self.rows = rows
        self.watched: dict[str, Watched] = {}
        self.list_asked = 0.0
        self.runs: list[Run] = []
        self.problem = ""
        self._wake, self._ended = threading.Event(), False
        self._waits, self._works = Pace(1.0, 15.0), Pace(5.0, 30.0)
        self._ending = Pace(1.0, 5.0)

    def ask_list(self, runs: Sequence[Run]) -> None:
        """The list is open, and these of its runs live here."""
        fresh = time.monotonic() - self.list_asked > LOOKED_AT or len(runs) != len(self.runs)
        self.runs, self.list_asked = list(runs), time.monotonic()
        if fresh:
            self._wake.set()

    def watch(self, run: Run, log: str | None = None) -> Watched:
        """A run's page is open, or the page of one of its logs; `has_files` and `has_logs` say what has been read."""
        one = self.watched.get(run.run_id)
        if one is None:
            one = self.watched.setdefault(run.run_id, Watched(run))
        fresh = not one.open()
        if one.run.state in LIVE and run.state not in LIVE:
            self._read_again(one)
        one.run, one.asked = run, time.monotonic()
        if log is not None:
            fresh |= log not in one.logs_asked
            one.logs_asked[log] = one.asked
        if fresh:
            self._read_again(one)
        return one

    def end(self) -> None:
        self._ended = True
        self._wake.set()

    def run(self) -> None:
        with suppress(UserError), Backends() as backends:
            while not self._ended:
                self._guarded_turn(backends)
                self._wake.wait(0.25 if self._at_work() else _KEPT + 1)
                self._wake.clear()

    def _read_again(self, one: Watched) -> None:
        for pace in (one.reading, one.finding, one.logging):
            pace.now()
        self._wake.set()

    def _at_work(self) -> bool:
        listing = time.monotonic() - self.list_asked < LOOKED_AT and bool(self.runs)
        return listing or any(one.open() for one in list(self.watched.values()))

    def _guarded_turn(self, backends: Backends) -> None:
        """One turn; what fails is told, and tried again: pages must not stand still without a word."""
        try:
            self._turn(backends)
        except Exception as error:
            text = str(error).removeprefix("error: ")
            self.problem = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
            for one in list(self.watched.values()):
                one.problem = self.problem
                one.has_files.set()
                one.has_logs.set()
            self._wake.wait(_AFTER_FAILURE)

    def _turn(self, backends: Backends) -> None:
        known = list(self.watched.items())
        for name, one in known:
            if time.monotonic() - one.asked > _KEPT:
                self.watched.pop(name, None)
        open_ = [one for _, one in known if one.open()]
        self._read(backends, [one for one in open_ if one.reading.due()])
        for one in open_:
            if one.wanted_logs():
                self._read_logs(backends, one)
        self._poll(backends, open_)

    # How runs are.

    def _poll(self, backends: Backends, open_: Sequence[Watched]) -> None:
        listed = self.runs if time.monotonic() - self.list_asked < LOOKED_AT else []
        runs = {run.run_id: run for run in [*listed, *(one.run for one in open_)]}
        live = [now for name in runs if (now := self.rows.runs.get(name)) and now.state in LIVE]
        pace = self._works if all(run.state == "running" for run in live) else self._waits
        opened = [run for run in live if run.run_id in self.watched and self.watched[run.run_id].open()]
        if opened and self._ending.due():
            self._ending.done(False)
            if any_ended(backends.of(opened[0]).host, opened):
                pace.now()
        if not live or not pace.due():
            return
        problems: list[str] = []
        with Ledger() as ledger:
            known = refresh(ledger, backends, live, problems.append)
        running = [one.run for one in known if one.run.state == "running" and listed][:_MOST_PROGRESS]
        self.rows.tell_progress(progress_of(backends, running, problems.append))
        self.problem = problems[0] if problems else ""
        news = [one.run for one in known] != live
        for pace in (self._waits, self._works, self._ending):
            pace.done(news)
        for one in known:
            if (watched := self.watched.get(one.run.run_id)) and one.seen:
                watched.nodes, watched.expected_start = one.seen.nodes, one.seen.expected_start

    # What they have written.

    def _read(self, backends: Backends, due: Sequence[Watched]) -> None:
        if not due:
            return
        problems: list[str] = []
        for one in due:
            if one.files is None:
                one.files = open_runs(backends, [one.run], self.rows.folder)[0]
            one.files.run = one.run
        before = {one.run.run_id: one.files.metrics().offset for one in due if one.files}
        for one in due:  # a page is held up by its own run's file alone
            if one.files:
                with one.lock:
                    update([one.files], problems.append)
                one.has_files.set()
        far = progress_of(backends, [one.run for one in due if one.finding.due()], problems.append)
        for one in due:
            if one.run.run_id in far:
                one.progress = far[one.run.run_id]
                one.finding.done(False)
            one.problem = problems[0] if problems else ""
            news = bool(one.files and one.files.metrics().offset != before[one.run.run_id])
            one.reading.done(news)
            one.has_files.set()

    def _read_logs(self, backends: Backends, one: Watched) -> None:
        if not one.logging.due():
            return
        backend = backends.of(one.run)
        if not one.sources or one.finding.due():
            one.sources = backend.log_sources(one.run)
        news = False
        for name in one.wanted_logs():
            source = chosen(one.sources, name)
            if source is not None:
                news |= self._read_log(backend, one, source)
        one.logging.done(news)
        one.has_logs.set()

    def _read_log(self, backend: Backend, one: Watched, source: LogSource) -> bool:
        if source not in one.tails:
            one.tails[source] = open_tail(backend, one.run, source)
        tail = one.tails[source]
        with one.lock:
            news = tail.read(backend)
            if not news and one.run.state not in LIVE:
                tail.end()
        return news


class Places:
    """The executors of the ledger's runs, each with its thread from when a page first needs it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}
        threading.Thread(target=self._settle, daemon=True, name="ui-settle").start()

    def of(self, run: Run) -> Place:
        key = repr((run.executor, sorted(dict(run.contact).items(), key=str)))
        with self._lock:
            if key not in self._places:
                self._places[key] = Place(self.rows, run)
                self._places[key].start()
            return self._places[key]

    def ask_list(self) -> None:
        """The list of runs is open: those that live are asked after."""
        here: dict[Place, list[Run]] = {}
        for run in list(self.rows.runs.values()):
            if run.state in LIVE:
                here.setdefault(self.of(run), []).append(run)
        for place, runs in here.items():
            place.ask_list(runs)

    def problems(self) -> list[str]:
        with self._lock:
            return [place.problem for place in self._places.values() if place.problem]

    def end(self) -> None:
        with self._lock:
            for place in self._places.values():
                place.end()

    def _settle(self) -> None:
        """What the ledger owes to clients that died, as every `jobs` command does it first."""
        with suppress(UserError), Ledger() as ledger, Backends() as backends:
            settle(ledger, backends, lambda text: None)
