"""Logs that grow, read on from where the last look ended: whole lines, no gap, nothing twice, little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from nemotron_launch.backends.live import Backend, LogSource
from nemotron_launch.frozen import frozen
from nemotron_launch.jobs.run import Run

LONGEST_LINE = 1 << 16  # bytes that are held back at most; a longer line is cut
_FINAL = 3  # looks without news after which the log of an attempt that is over is left alone
Wanted = Callable[[LogSource], bool]


@frozen
class Piece:
    """Whole lines of one log, as they were written, the last one with its line break."""

    run: Run
    source: LogSource
    data: bytes


class _Log:
    """One log: how far it was read, and the line that is not whole yet."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.rest = b""
        self.quiet = 0

    def take(self, data: bytes) -> bytes:
        self.offset += len(data)
        self.rest += data
        whole, line_end, self.rest = self.rest.rpartition(b"\n")
        whole += line_end
        while len(self.rest) > LONGEST_LINE:
            cut = _character_start(self.rest, LONGEST_LINE)
            whole += self.rest[:cut] + b"\n"
            self.rest = self.rest[cut:]
        return whole


class LogStream:
    """The logs of one run. wanted: which of them. start: where to begin, in bytes, where not at the beginning.

    A cut connection costs nothing: an offset moves only when its bytes are here.
    """

    def __init__(self, run: Run, wanted: Wanted = lambda source: True, start: Mapping[LogSource, int] | None = None):
        self.run = run
        self._wanted = wanted
        self._start = start or {}
        self._logs: dict[LogSource, _Log] = {}

    @property
    def attempt(self) -> int:
        """The newest attempt that has a log."""
        return max((source.attempt for source in self._logs), default=0)

    def look(self, backend: Backend) -> None:
        """Ask which logs there are."""
        before = self.attempt
        for source in backend.log_sources(self.run):
            if source not in self._logs and self._wanted(source):
                self._logs[source] = _Log(self._start.get(source, 0))
        if self.attempt > before:
            self.once_more()

    def once_more(self) -> None:
        """Read all logs again for a while, those of earlier attempts too: their last bytes may come late."""
        for log in self._logs.values():
            log.quiet = 0

    def read(self, backend: Backend) -> Iterator[Piece]:
        """What is new, oldest attempt first. Until it yields nothing there may be more."""
        newest = self.attempt
        open_ = {
            source: log
            for source, log in self._logs.items()
            if source.attempt == newest or source.name == "job" or log.quiet < _FINAL
        }
        news = backend.read_logs({source: log.offset for source, log in open_.items()}) if open_ else {}
        for source in sorted(open_, key=_order):
            data = news.get(source, b"")
            log = open_[source]
            log.quiet = 0 if data else log.quiet + 1
            if lines := log.take(data):
                yield Piece(self.run, source, lines)

    def last_words(self) -> Iterator[Piece]:
        """Lines that were never ended, when no more will come."""
        for source, log in sorted(self._logs.items(), key=lambda item: _order(item[0])):
            if log.rest:
                rest, log.rest = log.rest, b""
                yield Piece(self.run, source, rest + b"\n")


def tail_starts(backend: Backend, sources: Sequence[LogSource], lines: int) -> dict[LogSource, int]:
    """Where the last lines of each log begin, in bytes: reads on from the beginning, keeps only positions."""
    from collections import deque

    ends: dict[LogSource, deque[int]] = {source: deque([0], maxlen=lines + 1) for source in sources}
    sizes = dict.fromkeys(sources, 0)
    reading = set(sources)
    while reading:
        news = backend.read_logs({source: sizes[source] for source in reading})
        for source, data in news.items():
            at = data.find(b"\n")
            while at >= 0:
                ends[source].append(sizes[source] + at + 1)
                at = data.find(b"\n", at + 1)
            sizes[source] += len(data)
        reading = set(news)
    # The place behind the last line break begins a line only where something follows it.
    starts = {}
    for source, places in ends.items():
        known = list(places)
        if known[-1] == sizes[source] and len(known) > 1:
            known.pop()
        starts[source] = known[-lines] if lines and len(known) >= lines else (known[0] if lines else sizes[source])
    return starts


def _order(source: LogSource) -> tuple[int, bool, int, str]:
    digits = source.name.rpartition("-")[2]
    return source.attempt, source.name != "job", int(digits) if digits.isdigit() else 0, source.name


def _character_start(data: bytes, at: int) -> int:
    """The place at or before `at` where a character of UTF-8 begins."""
    for back in range(4):
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at
