"""The ends of logs for a page: clean lines, numbered, as many as a person scrolls through."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from nemotron_launch.backends.live import Backend, LogSource
from nemotron_launch.jobs.log_stream import LogStream
from nemotron_launch.jobs.log_text import clean, ends
from nemotron_launch.jobs.run import Run

_KEPT = 5000  # lines
_BEFORE = 256 << 10  # bytes of a log's end that are read when it is opened


class Tail:
    """The end of one log as it grows. `cut`: whether it began before what is read."""

    def __init__(self, run: Run, source: LogSource, start: int) -> None:
        self.source = source
        self.cut = start > 0
        self._half = start > 0  # the first line is the end of one
        self._stream = LogStream(run, lambda one: one == source, {source: start})
        self._found = False
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._count = 0

    def read(self, backend: Backend) -> bool:
        """Read on; whether there was anything."""
        if not self._found:
            self._stream.look(backend)
            self._found = True
        pieces = list(self._stream.read(backend))
        for piece in pieces:
            self._take(piece.data)
        return bool(pieces)

    def end(self) -> None:
        """No more will come: a line without its end is one too."""
        for piece in self._stream.last_words():
            self._take(piece.data)

    def once_more(self) -> None:
        self._stream.once_more()

    def since(self, number: int | None, most: int) -> dict[str, Any]:
        """Lines from this number on, at most so many of the newest; None: the newest."""
        first = self._count - len(self._lines)
        start = max(first, self._count - most, first if number is None else min(number, self._count))
        lines = [self._lines[at] for at in range(start - first, len(self._lines))]
        return {"lines": lines, "first": start, "next": self._count, "cut": self.cut or start > (number or 0)}

    def _take(self, data: bytes) -> None:
        lines = data[:-1].split(b"\n")
        if self._half:
            self._half = False
            lines = lines[1:]
        self._count += len(lines)
        self._lines.extend(clean(line) for line in lines[-_KEPT:])


def open_tail(backend: Backend, run: Run, source: LogSource) -> Tail:
    """The end of a log; of one whose size cannot be asked for, all of it."""
    return Tail(run, source, ends(backend, [source], _BEFORE)[source])


def chosen(sources: Sequence[LogSource], wanted: str) -> LogSource | None:
    """The log that a page asks for as `attempt/name`; else that of the newest attempt's first node."""
    for source in sources:
        if f"{source.attempt}/{source.name}" == wanted:
            return source
    newest = [source for source in sources if source.attempt == max(one.attempt for one in sources)]
    return next((one for one in newest if one.name != "job"), newest[0] if newest else None)
