"""Curves in characters: a line of blocks, or dots of Braille, for a terminal of any width."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a character, by row and column
_BLANK = 0x2800


def bins(values: Sequence[float], count: int) -> list[float | None]:
    """Means of `count` stretches of the same length, or the values themselves where there are fewer."""
    if len(values) <= count:
        return [value if math.isfinite(value) else None for value in values]
    found: list[float | None] = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        known = [value for value in part if math.isfinite(value)]
        found.append(math.fsum(known) / len(known) if known else None)
    return found


def sparkline(values: Sequence[float], width: int) -> str:
    """One line of at most `width` blocks, from the least to the greatest value."""
    shown = bins(values, width)
    low, high = _reach(shown)
    return "".join(" " if one is None else _BLOCKS[_level(one, low, high, len(_BLOCKS))] for one in shown)


def braille(values: Sequence[float], width: int, height: int) -> list[str]:
    """`height` lines of `width` characters, each of two by four dots, joined where the curve is steep."""
    shown = bins(values, 2 * width)
    low, high = _reach(shown)
    rows = 4 * height
    cells = [[0] * width for _ in range(height)]
    # Few values are spread over the whole width.
    stretch = (2 * width - 1) / (len(shown) - 1) if 1 < len(shown) < 2 * width else 1.0
    before: tuple[int, int] | None = None
    for number, value in enumerate(shown):
        if value is None:
            before = None
            continue
        here = (min(2 * width - 1, round(number * stretch)), rows - 1 - _level(value, low, high, rows))
        for x, y in _line(before or here, here):
            cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        before = here
    return ["".join(chr(_BLANK | cell) for cell in row) for row in cells]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / steps), round(start[1] + (end[1] - start[1]) * i / steps))
        for i in range(steps + 1)
    ]


def _reach(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (0.0, 0.0)


def _level(value: float, low: float, high: float, levels: int) -> int:
    if high <= low:
        return levels // 2
    return min(levels - 1, int((value - low) / (high - low) * levels))
