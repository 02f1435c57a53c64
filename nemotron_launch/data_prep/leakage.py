"""Training rows whose prompt is a validation prompt too, exactly or nearly: they would flatter a validation score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemotron_launch.data_prep.duplicates import DISTINCT, EXACT, LEADERS, NEAR, Found, Texts, chunks, record, similar
from nemotron_launch.data_prep.minhash import Near

#: Sides of a row, as `find` is told them.
OUT, TRAIN, VALIDATION = 0, 1, 2

#: Validation rows whose records are in memory at once (50 MiB); with more, the training rows are read several times.
SLICE_ROWS = 1 << 16

_TABLE_BITS = 20


def find(parts: Sequence[Path], sides: np.ndarray, near: Near | None, texts: Texts | None = None) -> Found:
    """Which training rows leak: `kind` is EXACT or NEAR and `of` the validation row of (nearly) the same prompt.

    parts: files of records (`duplicates.signatures` of the prompts, without `apart`), in source order. sides
    (uint8, N): TRAIN, VALIDATION, or OUT for rows that were dropped. near: as the records were made with, None to look
    for equal prompts only. texts: gives the prompts of rows (needed with near). All other rows are DISTINCT.
    Of several validation rows, the first equal one is named, else the first similar one of the first band that finds
    one.
    """
    found = Found(np.zeros(len(sides), np.uint8), np.arange(len(sides), dtype=np.uint32))
    validation = np.flatnonzero(sides == VALIDATION)
    slices = [validation[i : i + SLICE_ROWS] for i in range(0, len(validation), SLICE_ROWS)]
    dtype = record(near)
    for held in slices:
        _find_equal(found, parts, dtype, sides, held)
    if near is not None and texts is not None:
        for held in slices:
            _find_similar(found, parts, sides, held, near, texts)
    return found


def _find_equal(found: Found, parts: Sequence[Path], dtype: np.dtype, sides: np.ndarray, held: np.ndarray) -> None:
    exact = _records(parts, dtype, held)["exact"]
    order = np.lexsort((exact[:, 1], exact[:, 0]))  # stable: the first of equal rows comes first
    exact, rows = exact[order], held[order]
    for first, records in chunks(parts, dtype):
        train = _open(found, sides, first, len(records))
        asked = records["exact"][train - first]
        at = np.minimum(np.searchsorted(exact[:, 0], asked[:, 0]), len(rows) - 1)
        same = (exact[at] == asked).all(axis=1)
        found.kind[train[same]] = EXACT
        found.of[train[same]] = rows[at[same]]


def _find_similar(
    found: Found, parts: Sequence[Path], sides: np.ndarray, held: np.ndarray, near: Near, texts: Texts
) -> None:
    dtype = record(near)
    tables = [_Table(column, held) for column in np.ascontiguousarray(_records(parts, dtype, held)["bands"].T)]
    for first, records in chunks(parts, dtype):
        for band, table in enumerate(tables):
            train = _open(found, sides, first, len(records))
            for step in range(LEADERS):
                hashes = records["bands"][train - first, band]
                train, others = table.rows(train, hashes, step)
                if not len(train):
                    break
                same = similar(others, train, near, texts)
                found.kind[train[same]] = NEAR
                found.of[train[same]] = others[same]
                train = train[~same]


class _Table:
    """Validation rows by the hash of one band. Most questions end at a table of the hashes' leading bits."""

    def __init__(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], rows[order]
        self._shift = np.uint64(64 - _TABLE_BITS)
        self._known = np.zeros(1 << _TABLE_BITS, bool)
        self._known[hashes >> self._shift] = True

    def rows(self, asking: np.ndarray, hashes: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the rows that ask, those for whose hash there is a validation row number `step`, and that row."""
        known = self._known[hashes >> self._shift]
        asking, hashes = asking[known], hashes[known]
        at = np.searchsorted(self._hashes, hashes) + step
        inside = np.minimum(at, len(self._rows) - 1)
        there = (at < len(self._rows)) & (self._hashes[inside] == hashes)
        return asking[there], self._rows[inside[there]]


def _open(found: Found, sides: np.ndarray, first: int, count: int) -> np.ndarray:
    """Numbers of the training rows of a chunk that do not leak so far."""
    chunk = slice(first, first + count)
    return first + np.flatnonzero((sides[chunk] == TRAIN) & (found.kind[chunk] == DISTINCT))


def _records(parts: Sequence[Path], dtype: np.dtype, rows: np.ndarray) -> np.ndarray:
    """The records of some rows (ascending)."""
    pieces = []
    for first, records in chunks(parts, dtype):
        begin, end = np.searchsorted(rows, [first, first + len(records)])
        pieces.append(records[rows[begin:end] - first])
    return np.concatenate(pieces)
