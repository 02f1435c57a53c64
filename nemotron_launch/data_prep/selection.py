"""Between the passes: what becomes of every row, as one number each, in the order of the sources.

Memory: about ten bytes a row; the rest is read part by part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nemotron_launch.data_prep import duplicates, leakage
from nemotron_launch.data_prep.blend import Source
from nemotron_launch.data_prep.minhash import Near
from nemotron_launch.data_prep.rows import Prepared, again
from nemotron_launch.data_prep.sources import loads
from nemotron_launch.data_prep.units import INDEX, read_array, salted

#: What becomes of a row: the number in `Selection.fate` is the place here.
FATES = ("train", "validation", "exact_duplicate", "near_duplicate", "leakage", "too_long", "weight", "max_rows")
TRAIN, VALIDATION, EXACT, NEAR, LEAKAGE, TOO_LONG, WEIGHT, MAX_ROWS = range(len(FATES))

_BIN_BITS = 20
_ALL = 1 << 64


@dataclass(frozen=True)
class Part:
    """A part of the first pass. first: number of its first row among all; line: lines of its file before its own."""

    name: str
    source: int
    place: str
    line: int
    first: int
    rows: int
    entries: int


@dataclass(frozen=True)
class Rules:
    """What decides; as in the step's config. near None: near duplicates stay. leakage: drop, report or off."""

    target: str
    seed: int
    by: str = "row"
    exact: bool = True
    near: Near | None = None
    leakage: str = "drop"
    max_length: int | None = None
    max_rows: int | None = None
    validation_size: float = 0


@dataclass(frozen=True)
class Selection:
    """fate (uint8, N): of FATES. of (uint32, N): the row that a duplicate or leak repeats. copies (uint8, N): how often
    a training row is taken. leaks (exact, near): training rows that repeat a prompt of validation, dropped or not."""

    fate: np.ndarray
    of: np.ndarray
    copies: np.ndarray
    leaks: tuple[int, int]


def select(
    parts: Sequence[Part],
    sources: Sequence[Source],
    folder: Path,
    rules: Rules,
    progress: Callable[[float], None] = lambda share: None,
) -> Selection:
    """Decide about every row: too long, duplicate, validation, leak, and what weights and max_rows draw, in this order.

    A row is compared with rows for the same use; of several that are the same, the first in the blend's order stays.
    """
    total = sum(part.rows for part in parts)
    fate = np.zeros(total, np.uint8)
    for part in parts:
        own = slice(part.first, part.first + part.rows)
        fate[own] = VALIDATION if sources[part.source].use == "validation" else TRAIN
        if rules.max_length is not None:
            fate[own][_index(folder, part)["tokens"] > rules.max_length] = TOO_LONG
    of = np.arange(total, dtype=np.uint32)
    if rules.exact or rules.near:
        texts = Texts(parts, folder, rules.target, lambda row: row.prompt if rules.by == "prompt" else row.text)
        found = duplicates.find(
            [folder / f"{part.name}.whole" for part in parts],
            folder,
            rules.near,
            texts if rules.near else None,
            sides=_sides(fate),
            progress=lambda share: progress(0.8 * share),
        )
        for kind, name in ((duplicates.EXACT, EXACT), (duplicates.NEAR, NEAR)):
            fate[found.kind == kind] = name
        of = found.of
        del found
    progress(0.8)
    _draw_validation(parts, folder, rules, fate)
    leaks = _find_leaks(parts, folder, rules, fate, of)
    progress(0.95)
    copies = np.ones(total, np.uint8)
    for number, source in enumerate(sources):
        if source.use == "train" and source.weight != 1:
            _draw_weight([part for part in parts if part.source == number], source, folder, rules, fate, copies)
    if rules.max_rows is not None:
        _draw_max_rows(parts, folder, rules, fate, copies)
    progress(1.0)
    return Selection(fate, of, copies, leaks)


class Texts:
    """Texts of rows by their numbers, read from the parts."""

    def __init__(self, parts: Sequence[Part], folder: Path, target: str, text: Callable[[Prepared], str]) -> None:
        self._parts, self._folder, self._text = parts, folder, text
        self._prepare = again(target)
        self._firsts = np.array([part.first for part in parts], np.int64)

    def __call__(self, rows: np.ndarray) -> list[str]:
        texts: list[str] = []
        numbers = np.searchsorted(self._firsts, rows, side="right") - 1
        for number in dict.fromkeys(numbers.tolist()):
            part = self._parts[number]
            own = rows[numbers == number].astype(np.int64) - part.first
            if len(own) * 16 > part.rows:
                index = read_array(self._folder / f"{part.name}.index", INDEX)[own]
            else:
                with (self._folder / f"{part.name}.index").open("rb") as stream:
                    index = np.frombuffer(b"".join([_entry(stream, row) for row in own.tolist()]), INDEX)
            with (self._folder / f"{part.name}.rows").open("rb") as stream:
                for offset, size in zip(index["offset"].tolist(), index["size"].tolist(), strict=True):
                    stream.seek(offset)
                    texts.append(self._text(self._prepare(loads(stream.read(size)))))
        return texts


def _entry(stream: BinaryIO, row: int) -> bytes:
    stream.seek(row * INDEX.itemsize)
    return stream.read(INDEX.itemsize)


def _index(folder: Path, part: Part) -> np.ndarray:
    return read_array(folder / f"{part.name}.index", INDEX)


def _sides(fate: np.ndarray) -> np.ndarray:
    sides = np.full(len(fate), leakage.OUT, np.uint8)
    sides[fate == TRAIN] = leakage.TRAIN
    sides[fate == VALIDATION] = leakage.VALIDATION
    return sides


def _draw_validation(parts: Sequence[Part], folder: Path, rules: Rules, fate: np.ndarray) -> None:
    """Turn training rows into validation rows: all of a prompt or none, and at most as many as asked for."""
    size = rules.validation_size
    train = int(np.count_nonzero(fate == TRAIN))
    wanted = math.floor(size * train + 0.5) if size < 1 else int(size)
    if not wanted:
        return

    def draws() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in parts:
            values = _index(folder, part)["draw"][_own(fate, part) == TRAIN]
            yield values, np.ones(len(values))

    below = bound(draws, min(wanted, train), at_least_one=True)
    for part in parts:
        own = _own(fate, part)
        own[(own == TRAIN) & _below(_index(folder, part)["draw"], below)] = VALIDATION


def _find_leaks(parts: Sequence[Part], folder: Path, rules: Rules, fate: np.ndarray, of: np.ndarray) -> tuple[int, int]:
    if rules.leakage == "off" or not (fate == VALIDATION).any():
        return 0, 0
    texts = Texts(parts, folder, rules.target, lambda row: row.prompt)
    asked = [folder / f"{part.name}.asked" for part in parts]
    found = leakage.find(asked, _sides(fate), rules.near, texts if rules.near else None)
    leaks = int(np.count_nonzero(found.kind == duplicates.EXACT)), int(np.count_nonzero(found.kind == duplicates.NEAR))
    if rules.leakage == "drop":
        leaked = found.kind != duplicates.DISTINCT
        fate[leaked] = LEAKAGE
        of[leaked] = found.of[leaked]
    return leaks


def _draw_weight(
    parts: Sequence[Part], source: Source, folder: Path, rules: Rules, fate: np.ndarray, copies: np.ndarray
) -> None:
    """How often each of a source's training rows is taken: the weight's whole part, and a share of them once more."""
    whole = math.floor(source.weight)
    train = sum(int(np.count_nonzero(_own(fate, part) == TRAIN)) for part in parts)

    def draws() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in parts:
            values = salted(_index(folder, part)["key"][_own(fate, part) == TRAIN], rules.seed, 2)
            yield values, np.ones(len(values))

    below = bound(draws, math.floor((source.weight - whole) * train + 0.5))
    for part in parts:
        own, own_copies = _own(fate, part), _own(copies, part)
        own_copies[:] = whole + _below(salted(_index(folder, part)["key"], rules.seed, 2), below)
        own[(own == TRAIN) & (own_copies == 0)] = WEIGHT


def _draw_max_rows(parts: Sequence[Part], folder: Path, rules: Rules, fate: np.ndarray, copies: np.ndarray) -> None:
    assert rules.max_rows is not None

    def draws() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in parts:
            train = _own(fate, part) == TRAIN
            yield salted(_index(folder, part)["key"][train], rules.seed, 3), _own(copies, part)[train].astype(float)

    below = bound(draws, rules.max_rows)
    for part in parts:
        own = _own(fate, part)
        own[(own == TRAIN) & ~_below(salted(_index(folder, part)["key"], rules.seed, 3), below)] = MAX_ROWS


def _own(values: np.ndarray, part: Part) -> np.ndarray:
    """The view of a part's rows."""
    return values[part.first : part.first + part.rows]


def _below(values: np.ndarray, below: int) -> np.ndarray:
    result: np.ndarray = np.ones(len(values), bool) if below >= _ALL else values < np.uint64(below)
    return result


def bound(
    draws: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], most: int, *, at_least_one: bool = False
) -> int:
    """The greatest number so that the values below it weigh `most` together, or less.

    draws: gives all values (uint64) and their weights, piece by piece; it is called twice. at_least_one: where already
    the least value weighs more than `most`, it is below all the same, unless it is the only one.
    """
    bins = np.zeros(1 << _BIN_BITS)
    shift = np.uint64(64 - _BIN_BITS)
    for values, weights in draws():
        bins += np.bincount((values >> shift).astype(np.int64), weights, 1 << _BIN_BITS)
    sums = np.cumsum(bins)
    if sums[-1] <= most:
        return _ALL
    full = int(np.searchsorted(sums, most, side="right"))  # the bin in which the weight is exceeded
    before = float(sums[full - 1]) if full else 0.0
    inside = [(values[at], weights[at]) for values, weights in draws() for at in [(values >> shift) == full]]
    values = np.concatenate([pair[0] for pair in inside])
    weights = np.concatenate([pair[1] for pair in inside])
    distinct, at = np.unique(values, return_inverse=True)
    after = before + np.cumsum(np.bincount(at, weights))
    first_out = int(np.searchsorted(after, most, side="right"))
    if at_least_one and first_out == 0 and before == 0 and most > 0:
        first_out = 1
    if first_out < len(distinct):
        return int(distinct[first_out])
    return (full + 1) << int(shift)
