"""Reads a run's metrics.jsonl as it grows: a column of numbers for each metric. No host, no files: bytes come in."""

from __future__ import annotations

import json
import marshal
import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_AT_ONCE = 256  # lines that one call of the parser takes
_MOST_NAMES = 2000  # more than any trainer writes: what a damaged file may hold
_MOST_PROBLEMS = 20  # named one by one
_OF_EVERY_LINE = ("time", "epoch", "total_steps")
_KEPT_BACK = 64  # bytes before the end by which a file is known again
_NAN = math.nan
Row = Mapping[str, Any]


class MetricsFile:
    """The columns of a metrics.jsonl, fed in pieces of any size.

    A line is one JSON object: `step`, then flat names with numbers; null and what is not finite is NaN here, what is no
    number is left out. A step that is not behind the one before it means that the run went back to its last checkpoint:
    the later line holds, and what was between is cut. Lines of the same step with other names complete each other. A
    line that cannot be read is named in `problems`, and the rest is used.

    file: the name by which problems call it.
    """

    def __init__(self, file: str = "metrics.jsonl") -> None:
        self.file = file
        self.offset = 0  # bytes taken so far, the torn line at the end included
        self.last: dict[str, Any] = {}  # the last line, completed by those of its step
        self.bad_lines = 0
        self.restarts = 0  # how often the steps went back
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self._torn = b""
        self._tail = b""
        self._lines = 0
        self._problems: list[tuple[int, str]] = []  # line, what is wrong; line 0 is the whole file

    # What is in it.

    @property
    def names(self) -> list[str]:
        """The metrics, in the order in which they first came; without step, but with time and the like."""
        return list(self._steps)

    @property
    def times(self) -> Sequence[float]:
        """When each line was written, in seconds since 1970."""
        return self.values("time")

    def steps(self, name: str) -> Sequence[int]:
        """The steps at which a metric was written, rising; empty where there is no such metric."""
        return self._steps.get(name) or array("q")

    def values(self, name: str) -> Sequence[float]:
        """Its values at these steps; NaN where the line has null."""
        return self._values.get(name) or array("d")

    @property
    def problems(self) -> list[str]:
        """What is wrong with lines that were left out, the first ones."""
        return [f"{self.file}:{line}: {text}" if line else f"{self.file}: {text}" for line, text in self._problems]

    @property
    def last_step(self) -> int | None:
        return self.last.get("step")

    @property
    def tail(self) -> bytes:
        """The last bytes taken. They stand before `offset` in the file, unless it has been cut or replaced."""
        return self._tail

    def since(self, step: int) -> MetricsFile:
        """What it says of this step and those behind it; metrics without any are left out."""
        newer = MetricsFile(self.file)
        newer.last = self.last
        for name, steps in self._steps.items():
            at = bisect_left(steps, step)
            if at < len(steps):
                newer._steps[name], newer._values[name] = steps[at:], self._values[name][at:]
        return newer

    # How it comes in.

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the file. A line without its end waits for it."""
        if not data:
            return
        self.offset += len(data)
        self._tail = (self._tail + data[-_KEPT_BACK:])[-_KEPT_BACK:]
        lines = (self._torn + data).split(b"\n")
        self._torn = lines.pop()
        for start in range(0, len(lines), _AT_ONCE):
            part = lines[start : start + _AT_ONCE]
            self._take(part)
            self._lines += len(part)

    def end(self) -> None:
        """No more comes: what is left without an end of line is a line too, if it is whole."""
        if self._torn and (row := _parsed(self._torn)) is not None and _step(row) is not None:
            torn, self._torn = self._torn, b""
            self._take([torn])

    def packed(self, *, since: int = 0) -> bytes:
        """All of it, for `join` in another process. since: the offset at which its first byte stands in the file."""
        columns = [(name, self._steps[name].tobytes(), self._values[name].tobytes()) for name in self._steps]
        first = min((steps[0] for steps in self._steps.values() if steps), default=None)
        head = (self.offset - since, self._tail, self._torn, self._lines, self.bad_lines, self._problems, self.restarts)
        return marshal.dumps((head, first, json.dumps(self.last), columns))

    def join(self, packed: bytes) -> bool:
        """Add what another one has read of the bytes that follow; False, and nothing done, where it must be read here.

        That is where the run went back from one part to the other, or a line was torn between them.
        """
        head, first, last, columns = marshal.loads(packed)
        offset, tail, torn, lines, bad, problems, restarts = head
        behind = first is None or self.last_step is None or first > self.last_step
        if self._torn or not behind or len(self._steps.keys() | {name for name, *_ in columns}) > _MOST_NAMES:
            return False
        for name, steps, values in columns:
            self._steps.setdefault(name, array("q")).frombytes(steps)
            self._values.setdefault(name, array("d")).frombytes(values)
        self._problems = [*self._problems, *((line and line + self._lines, text) for line, text in problems)]
        del self._problems[_MOST_PROBLEMS:]
        self.offset, self._tail, self._torn = self.offset + offset, (self._tail + tail)[-_KEPT_BACK:], torn
        self._lines, self.bad_lines, self.restarts = self._lines + lines, self.bad_lines + bad, self.restarts + restarts
        self.last = json.loads(last) or self.last
        return True

    def _take(self, lines: Sequence[bytes]) -> None:
        """Add some lines, all at once if they are whole, as nearly all are."""
        try:
            rows = json.loads(b"[" + b",".join(lines) + b"]")
        except (ValueError, RecursionError):
            rows = []
        # Two lines that are damaged could look like one, or one like two.
        if len(rows) != len(lines) or not self._add_block(rows):
            for number, line in enumerate(lines, self._lines + 1):
                self._take_line(line, number)

    def _take_line(self, line: bytes, number: int) -> None:
        if not line.strip():
            return
        row = _parsed(line)
        if row is None:
            self._problem(number, "is not a JSON object; the line is left out")
        elif _step(row) is None:
            self._problem(number, "has no step; the line is left out")
        else:
            self._add(row)

    def _problem(self, line: int, text: str) -> None:
        self.bad_lines += 1
        if len(self._problems) < _MOST_PROBLEMS:
            self._problems.append((line, text))

    def _add_block(self, rows: Sequence[Any]) -> bool:
        """Add rows, those with the same names as columns; False, and nothing done, where one of them is no row."""
        if not all(type(row) is dict and _step(row) is not None for row in rows):
            return False
        start = 0
        while start < len(rows):
            names, end = list(rows[start]), start + 1
            while end < len(rows) and list(rows[end]) == names:
                end += 1
            alike = rows[start:end]
            if not self._add_columns(names, alike):
                for row in alike:
                    self._add(row)
            start = end
        return True

    def _add_columns(self, names: Sequence[str], rows: Sequence[Row]) -> bool:
        """Add rows that have these names in this order; False, and nothing done, where that is not so simple."""
        before = self.last.get("step")
        steps = [row["step"] for row in rows]
        rising = all(a < b for a, b in pairwise([*([] if before is None else [before]), *steps]))
        if not rising or len(self._steps.keys() | names) > _MOST_NAMES:
            return False
        try:
            at = array("q", steps)
            columns = [array("d", values) for values in zip(*(row.values() for row in rows), strict=True)]
        except (TypeError, OverflowError):  # a null, a text, a number that is too large
            return False
        for name, column in zip(names, columns, strict=True):
            if name != "step":
                self._steps.setdefault(name, array("q")).extend(at)
                self._values.setdefault(name, array("d")).extend(column)
        self.last = dict(rows[-1])
        return True

    def _add(self, row: Row) -> None:
        step = _step(row)
        assert step is not None
        known = self.last.get("step")
        same = step == known and not any(name in self.last for name in row if name not in ("step", *_OF_EVERY_LINE))
        if known is not None and step <= known and not same:
            self.restarts += 1
            self._cut(step)
        self.last = {**self.last, **row} if same else dict(row)
        for name, value in row.items():
            if name == "step" or (same and name in _OF_EVERY_LINE):
                continue
            if value is None or isinstance(value, int | float):
                self._append(name, step, value)

    def _append(self, name: str, step: int, value: float | None) -> None:
        if name not in self._steps and len(self._steps) >= _MOST_NAMES:
            problem = (0, f"more than {_MOST_NAMES} different names; the rest is left out")
            if problem not in self._problems:
                self._problems.append(problem)
            return
        try:
            number = _NAN if value is None else float(value)
        except OverflowError:
            number = _NAN
        self._steps.setdefault(name, array("q")).append(step)
        self._values.setdefault(name, array("d")).append(number)

    def _cut(self, step: int) -> None:
        """Forget what was said of this step and those behind it."""
        for name, steps in self._steps.items():
            at = bisect_left(steps, step)
            del steps[at:], self._values[name][at:]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _step(row: Row) -> int | None:
    step = row.get("step")
    if type(step) is float and step.is_integer():
        step = int(step)
    return step if type(step) is int and abs(step) < 1 << 62 else None
