"""The values of `--sweep KEY=…`: Hydra's lists, choice(…) and range(…), and logspace(…) for learning rates.

Each value stays the text that an override of it would be, so that a point of a sweep can be typed again by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from nemotron_launch.config.overrides import Reader, dump_value, fail, parse_key
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen

MOST = 100_000  # values of one axis: a mistyped step must not fill the memory
_FUNCTIONS = ("choice", "range", "logspace")


@frozen
class Axis:
    """What one `--sweep` says. key: dotted; mark: "", "+" or "++"; values: as text, in the order of the points."""

    key: str
    mark: str
    values: tuple[str, ...]

    def overrides(self) -> list[str]:
        """The override that each value is."""
        return [f"{self.mark}{self.key}={value}" for value in self.values]


def parse_axis(text: str) -> Axis:
    """Read `key=1,2`, `key=choice(a,b)`, `key=range(1,10,3)` or `key=logspace(1e-6,1e-4,3)`, or raise a UserError."""
    mark = next((mark for mark in ("++", "+", "~") if text.startswith(mark)), "")
    if mark == "~":
        fail(text, 0, "a key to set: a sweep deletes none")
    key, equals, _ = text[len(mark) :].partition("=")
    path = parse_key(text, key, len(mark))
    start = len(mark) + len(key) + 1
    if not equals:
        fail(text, start - 1, "'=' and values with commas between them")
    reader = Reader(text, start)
    reader.blanks()
    name, called, _ = text[reader.at :].partition("(")
    values = _function(reader, name.strip()) if called and name.strip().isidentifier() else _items(reader, ",")
    if reader.at < len(text):
        fail(text, reader.at, "',' or the end")
    return Axis(".".join(path), mark, tuple(values))


def _function(reader: Reader, name: str) -> list[str]:
    at = reader.at
    reader.at = reader.text.index("(", at) + 1
    if name == "choice":
        values = _items(reader, ",)")
        reader.expect(")")
    elif name in _FUNCTIONS:
        given = _arguments(reader)
        values = (_range if name == "range" else _logspace)(given, lambda expected: fail(reader.text, at, expected))
    elif name == "interval":
        fail(reader.text, at, "values: interval(…) has endlessly many, range(…) and logspace(…) some of them")
    else:
        fail(reader.text, at, f"{', '.join(_FUNCTIONS)} or values with commas (text with ( in it needs quotes)")
    reader.blanks()
    return values


def _items(reader: Reader, stop: str) -> list[str]:
    """Values with commas between them, each as it was written."""
    values = []
    while True:
        reader.blanks()
        start = reader.at
        reader.item(stop)
        values.append(reader.text[start : reader.at].strip())
        if reader.text[reader.at : reader.at + 1] != ",":
            return values
        reader.at += 1


def _arguments(reader: Reader) -> dict[str, Any]:
    """The arguments of a function: by their names, else by their numbers."""
    found: dict[str, Any] = {}
    while True:
        reader.blanks()
        start = reader.at
        name, equals, _ = reader.text[start:].partition("=")
        if equals and name.strip().isidentifier():
            reader.at = start + len(name) + 1
        else:
            name = str(len(found))
        value = reader.item(",)")
        if name.strip() in found:
            fail(reader.text, start, f"an argument that is not there yet, found {name.strip()} again")
        found[name.strip()] = value
        if reader.text[reader.at : reader.at + 1] != ",":
            break
        reader.at += 1
    reader.expect(")")
    return found


Refuse = Callable[[str], Any]


def _range(given: dict[str, Any], refuse: Refuse) -> list[str]:
    """start, stop, step as in Python, for numbers of any kind, added up in decimal: no 0.30000000000000004."""
    names = ("start", "stop", "step") if "1" in given or "start" in given else ("stop", "step")
    numbers = _numbers(given, names, refuse)
    if "stop" not in numbers:
        refuse("range(stop), range(start,stop) or range(start,stop,step)")
    start, stop, step = numbers.get("start", 0), numbers["stop"], numbers.get("step", 1)
    if step == 0:
        refuse("a step that is not 0")
    first, each = Decimal(repr(start)), Decimal(repr(step))
    count = math.ceil((Decimal(repr(stop)) - first) / each)
    if count < 1:
        refuse("a range with at least one value in it (its end does not belong to it)")
    if count > MOST:
        refuse(f"at most {MOST} values, this range has {count}")
    whole = all(isinstance(number, int) for number in (start, stop, step))
    values = [first + n * each for n in range(count)]
    return [dump_value(int(value) if whole else float(value)) for value in values]


def _logspace(given: dict[str, Any], refuse: Refuse) -> list[str]:
    """`count` values from `first` to `last`, both among them, each the same multiple of the one before."""
    numbers = _numbers(given, ("first", "last", "count"), refuse)
    if len(numbers) != 3 or not isinstance(numbers["count"], int):
        refuse("logspace(first,last,count): logspace(1e-6,1e-4,3) is 1e-6,1e-5,1e-4")
    first, last, count = numbers["first"], numbers["last"], int(numbers["count"])
    if first <= 0 or last <= 0:
        refuse("the values themselves, above 0, not their exponents: logspace(1e-6,1e-4,3)")
    if not 2 <= count <= MOST:
        refuse(f"a count from 2 to {MOST}")
    ratio = math.log(last / first) / (count - 1)
    inner = [float(f"{first * math.exp(ratio * n):.6g}") for n in range(1, count - 1)]
    return [dump_value(float(value)) for value in (first, *inner, last)]


def _numbers(given: dict[str, Any], names: tuple[str, ...], refuse: Refuse) -> dict[str, int | float]:
    """The arguments by name, each a finite number."""
    found: dict[str, int | float] = {}
    for name, value in given.items():
        if name.isdigit():
            if int(name) >= len(names):
                refuse(f"at most {len(names)} arguments: {', '.join(names)}")
            name = names[int(name)]
        if name not in names:
            refuse(f"the arguments {', '.join(names)}, found {name}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            refuse(f"a number for {name}, found {dump_value(value)}")
        if name in found:
            refuse(f"{name} once")
        found[name] = value
    return found


def zipped(axes: list[Axis]) -> list[tuple[str, ...]]:
    """The points of axes of the same length, taken side by side. UserError: where their lengths differ."""
    if len({len(axis.values) for axis in axes}) > 1:
        lengths = ", ".join(f"{axis.key} has {len(axis.values)}" for axis in axes)
        raise UserError("--zip pairs axes of the same length", where="--sweep", hint=lengths)
    return list(zip(*(axis.overrides() for axis in axes), strict=True))
