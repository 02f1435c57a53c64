"""Follows runs to their end: waits with the queue's reason, streams their logs, survives lost connections."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, Protocol

from nemotron_launch.backends.live import Backend
from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Host, Unreachable
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.log_stream import LogStream, Piece, Wanted
from nemotron_launch.jobs.run import OVER, Run
from nemotron_launch.jobs.status import Known, look

PATIENCE = 1800.0  # seconds without a connection after which following ends
MOST_LOGS = 16  # runs whose logs are streamed at once; of more only what becomes of them is told
_MOVED = 600  # seconds by which an expected start must move to be worth telling
_FINAL_LOOKS = 2  # looks at the logs that must find nothing, once a run is over
Answer = Literal["continue", "detach", "cancel"]


class Watcher(Protocol):
    """What following tells, and asks; a terminal, or a test."""

    def lines(self, piece: Piece) -> None:
        """New lines of a log."""

    def state(self, known: Known) -> None:
        """A run's state, reason or attempt is another than before."""

    def notice(self, text: str) -> None:
        """Something about the connection."""

    def interrupted(self) -> Answer | None:
        """What to do about a Ctrl-C since the last call; None where there was none."""

    def sleep(self, seconds: float) -> None:
        """Wait, less when a Ctrl-C comes."""


class Pace:
    """Seconds between two looks: from `first`, by a third longer each time, to `most`; back to `first` at news."""

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._pause = first
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def done(self, news: bool) -> None:
        """A look has been made; news: it found something."""
        self._pause = self._first if news else min(self._pause * 4 / 3, self._most)
        self._next = time.monotonic() + self._pause

    def now(self) -> None:
        """Make the next look at once."""
        self._next = 0.0

    @property
    def left(self) -> float:
        return max(0.0, self._next - time.monotonic())


def any_ended(host: Host | None, runs: Sequence[Run]) -> bool:
    """Whether a folder of these runs, if they are few, says that its run is over, before its executor was asked."""
    paths = {posixpath.join(run.state_dir, "exit_code"): 0 for run in runs}
    return bool(host and 0 < len(paths) <= MOST_LOGS and host.read(paths))


class Detached(UserError):
    """Following ended before the runs did; they go on."""


def follow(
    ledger: Ledger,
    backend: Backend,
    runs: Sequence[Run],
    watcher: Watcher,
    *,
    logs: bool = True,
    wanted: Wanted = lambda source: True,
    streams: Sequence[LogStream] | None = None,
    patience: float = PATIENCE,
) -> list[Run]:
    """Follow runs of one backend until all are over; their last rows.

    The executor is asked every 1 to 15 s while something waits, every 5 to 30 s while all runs work (their exit_code
    files tell the end at once), the logs every 0.3 to 3 s. Detached: on Ctrl-C, or when the connection was away for
    `patience` seconds.
    """
    return _Following(ledger, backend, runs, watcher, logs, wanted, streams, patience).to_the_end()


class _Following:
    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        runs: Sequence[Run],
        watcher: Watcher,
        logs: bool,
        wanted: Wanted,
        streams: Sequence[LogStream] | None,
        patience: float,
    ) -> None:
        self.ledger, self.backend, self.watcher, self.patience = ledger, backend, watcher, patience
        self.runs = {run.run_id: run for run in runs}
        streamed = list(runs) if logs and len(runs) <= MOST_LOGS else []
        made = streams if streams is not None else [LogStream(run, wanted) for run in streamed]
        self.streams = {stream.run.run_id: stream for stream in made}
        self.told: dict[str, tuple[object, ...]] = {}
        self.waits, self.works = Pace(1.0, 15.0), Pace(5.0, 30.0)
        self.reading, self.finding = Pace(0.3, 3.0), Pace(1.0, 5.0)
        self.lost_at: float | None = None
        self.to_cancel = False
        self.drained: dict[str, int] = {}

    @property
    def polling(self) -> Pace:
        return (
            self.works if all(run.state == "running" or run.state in OVER for run in self.runs.values()) else self.waits
        )

    def to_the_end(self) -> list[Run]:
        while True:
            self._heed(self.watcher.interrupted())
            try:
                if self.to_cancel:
                    self.backend.cancel(self._live())
                    self.to_cancel = False
                    self._ask_now()
                if self._turn():
                    return list(self.runs.values())
            except Unreachable as error:
                self._bear(error)
            else:
                if self.lost_at is not None:
                    self.watcher.notice("the connection is back")
                    self.lost_at = None
            pauses = [self.polling.left] if self._live() else []
            pauses += [self.reading.left] if self.streams else []
            self.watcher.sleep(min([1.0, *pauses]) if self.lost_at is None else 2.0)

    def _turn(self) -> bool:
        """One round; whether all is over and read."""
        if self._live() and self.finding.due() and self._ended():
            self._ask_now()
        if self._live() and self.polling.due():
            self._poll()
        if self.streams and self.reading.due():
            news = self._read()
            self.reading.done(news)
            if news:
                return False
        elif not self.streams and self.finding.due():
            self.finding.done(False)
        return not self._live() and all(self.drained.get(run_id, 0) >= _FINAL_LOOKS for run_id in self.streams)

    def _live(self) -> list[Run]:
        return [run for run in self.runs.values() if run.state not in OVER]

    def _poll(self) -> None:
        news = False
        for known in look(self.ledger, self.backend, self._live()):
            run, seen = known.run, known.seen
            self.runs[run.run_id] = run
            start = seen.expected_start if seen else None
            told = (run.state, run.reason, run.attempt, start and start // _MOVED)
            if self.told.get(run.run_id) != told:
                self.told[run.run_id] = told
                self.watcher.state(known)
                news = True
                if run.state in OVER and run.run_id in self.streams:
                    self.streams[run.run_id].once_more()
        if news:
            for pace in (self.finding, self.reading):
                pace.done(True)
                pace.now()
        for pace in (self.waits, self.works):
            pace.done(news)

    def _read(self) -> bool:
        """Read the logs that there are; whether any had news."""
        at_work = [stream for run_id, stream in self.streams.items() if self.drained.get(run_id, 0) < _FINAL_LOOKS]
        finding = self.finding.due()
        any_news = False
        for stream in at_work:
            run = self.runs[stream.run.run_id]
            if run.state in ("submitting", "pending") and not run.started:
                continue
            before = stream.attempt
            if finding or run.state in OVER:
                stream.look(self.backend)
            news = False
            for piece in stream.read(self.backend):
                news = True
                self.watcher.lines(piece)
            any_news |= news
            if run.state in OVER:
                self.drained[run.run_id] = 0 if news else self.drained.get(run.run_id, 0) + 1
                if self.drained[run.run_id] >= _FINAL_LOOKS:
                    for piece in stream.last_words():
                        self.watcher.lines(piece)
            elif stream.attempt > before:
                self._ask_now()
        if finding:
            self.finding.done(any_news)
        return any_news

    def _ended(self) -> bool:
        return any_ended(self.backend.host, self._live())

    def _bear(self, error: Unreachable) -> None:
        """A connection that is away: say so once, try again, until patience ends."""
        now = time.monotonic()
        if self.lost_at is None:
            self.lost_at = now
            self.watcher.notice(f"{error.message}; the runs go on, trying again")
        with suppress(UserError):
            self.backend.close()
        if now - self.lost_at > self.patience:
            raise Detached(
                f"no connection for {self.patience / 60:.0f} minutes: {error.message}",
                hint=f"the run goes on; to follow it again:  nemotron jobs attach {self._name()}",
                exit_code=1,
            )

    def _heed(self, answer: Answer | None) -> None:
        if answer == "detach":
            hint = f"to follow it again:  nemotron jobs attach {self._name()}"
            raise Detached("no longer following; the run goes on", hint=hint, exit_code=130)
        if answer == "cancel":
            self.watcher.notice("asking the executor to end the run")
            self.to_cancel = True

    def _ask_now(self) -> None:
        for pace in (self.waits, self.works):
            pace.done(True)
            pace.now()

    def _name(self) -> str:
        first = next(iter(self.runs.values()))
        return first.sweep or first.run_id
