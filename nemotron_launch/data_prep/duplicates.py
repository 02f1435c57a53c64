"""Rows that say what an earlier row said: exactly, or nearly; found in flat memory over millions of rows.

A worker turns its rows into records with `signatures` and appends them to a file beside its rows; `find` joins the
records of all files. Rows are numbered from 0 through all files in the order in which these are given, and the first
of several duplicates is kept, so neither the number of workers nor their timing changes what is found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nemotron_launch.data_prep.minhash import Near, band_hashes, jaccard, minima, normalised, shingles

#: What `Found.kind` says of a row.
DISTINCT, EXACT, NEAR = 0, 1, 2

#: Texts of the rows with these numbers (ascending), in that order.
Texts = Callable[[np.ndarray], Sequence[str]]

#: Rows that one bucket file holds about, and records read at once: they decide the memory, not the result.
BUCKET_ROWS = 1 << 19
CHUNK_ROWS = 1 << 15

#: Bucket files that are open at once, at most; processes are often allowed 1,024.
OPEN_FILES = 600

#: In a group of rows that agree in a band, each row is compared with so many earlier ones that are distinct; rows that
#: share long phrases and are still distinct would otherwise all be compared with each other.
LEADERS = 16

_PAIRS_AT_ONCE = 1024
#: What tells the hashes of one side's rows from those of another's.
_SALTS = np.arange(256, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Found:
    """What became of N rows. kind (uint8, N): DISTINCT, EXACT or NEAR; of (uint32, N): the earlier row that a row
    repeats, its own number where it repeats none.

    The row named by a near duplicate has at least the threshold's Jaccard index with it; it may itself be a near
    duplicate of a still earlier one, whose chain ends at a row that is kept.
    """

    kind: np.ndarray
    of: np.ndarray


def record(near: Near | None) -> np.dtype:
    """The record of one row: `exact`, 128 bits of its normalised text, and one hash for each band of its MinHash."""
    bands = [("bands", "<u8", (near.banding[0],))] if near else []
    return np.dtype([("exact", "<u8", (2,)), *bands])


def signatures(texts: Sequence[str], near: Near | None, *, apart: Sequence[str] | None = None) -> np.ndarray:
    """Records (`record(near)`, N) of N texts, to be appended to a part's file with `tofile`.

    near None: for exact duplicates only. apart: texts of which rows that differ in them are never near duplicates,
    such as the right answers of prompts that differ in one number; exact duplicates do not regard it.
    """
    plain = [normalised(text) for text in texts]
    return _records(plain, _minima(plain, near), near, apart)


def row_signatures(
    prompts: Sequence[str], answers: Sequence[str], near: Near | None, *, apart: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(records of prompt, newline and answer; records of the prompt), as `signatures` of these texts, at half the cost.

    A text's shingles are those of its prompt and those of its end, from the prompt's last words on; so are its minima.
    """
    asked = [normalised(prompt) for prompt in prompts]
    whole, ends, alone = [], [], []
    context = near.shingle_words - 1 if near else 0
    for prompt, answer in zip(asked, answers, strict=True):
        said = normalised(answer)
        text = f"{prompt} {said}" if prompt and said else prompt or said
        whole.append(text)
        words = prompt.rsplit(" ", context)
        alone.append(not prompt or len(words) <= context)  # its one shingle may be none of the whole
        ends.append(text if alone[-1] else " ".join([*words[1:], said]) if said else prompt)
    minima_asked, minima_whole = _minima(asked, near), _minima(ends, near)
    if near:
        own = ~np.array(alone, bool)
        minima_whole[own] = np.minimum(minima_whole[own], minima_asked[own])
    return _records(whole, minima_whole, near, apart), _records(asked, minima_asked, near, None)


def _minima(plain: Sequence[str], near: Near | None) -> np.ndarray:
    return minima(*shingles(plain, near.shingle_words), near) if near else np.zeros((len(plain), 0), np.uint32)


def _records(plain: Sequence[str], least: np.ndarray, near: Near | None, apart: Sequence[str] | None) -> np.ndarray:
    records = np.zeros(len(plain), record(near))
    records["exact"] = np.frombuffer(b"".join(_digest(text, 16) for text in plain), "<u8").reshape(-1, 2)
    if near and plain:
        records["bands"] = band_hashes(least, near)
        if apart is not None:
            labels = np.frombuffer(b"".join(_digest(normalised(text), 8) for text in apart), "<u8")
            records["bands"] ^= labels[:, None]
    return records


def find(
    parts: Sequence[Path],
    folder: Path,
    near: Near | None,
    texts: Texts | None = None,
    *,
    sides: np.ndarray | None = None,
    progress: Callable[[float], None] | None = None,
) -> Found:
    """Which rows repeat an earlier one. Memory: about 50 MiB and 5 bytes a row; the rest lies in `folder`.

    parts: files of records, in source order; near: as their records were made with, None to leave near duplicates in;
    texts: gives the rows' texts, by which candidates are compared (needed with near). folder: for files of at most
    (16 + 12 · bands) bytes a row, all removed again. sides (uint8, N): rows of different sides, such as training and
    validation, are never duplicates of each other, and those of side 0 are left out (as DISTINCT).
    progress: is told the share that is done, 0 to 1, now and then.
    """
    tell = progress or (lambda share: None)
    dtype = record(near)
    total = sum(part.stat().st_size // dtype.itemsize for part in parts)
    found = Found(np.zeros(total, np.uint8), np.arange(total, dtype=np.uint32))

    def used(first: int, count: int) -> np.ndarray:
        """Numbers of the rows of a chunk that are still looked at."""
        rows = np.arange(first, first + count, dtype=np.uint32)
        keep = found.kind[first : first + count] == DISTINCT
        return rows[keep] if sides is None else rows[keep & (sides[first : first + count] > 0)]

    with _Buckets(folder, "exact", 1, total, words=2) as buckets:
        for first, records in chunks(parts, dtype):
            rows = used(first, len(records))
            exact = records["exact"][rows - first]
            if sides is not None:
                exact[:, 0] ^= _SALTS[sides[rows]]
            buckets.add(0, exact, rows)
        for hashes, rows in buckets.of(0):
            _mark_exact(found, hashes, rows)
    tell(0.2)
    if near is None or texts is None:
        return found
    bands = near.banding[0]
    with _Buckets(folder, "band", bands, total, words=1) as buckets:
        for first, records in chunks(parts, dtype):
            rows = used(first, len(records))
            hashes = records["bands"][rows - first]
            if sides is not None:
                hashes ^= _SALTS[sides[rows]][:, None]
            for band in range(bands):
                buckets.add(band, hashes[:, band : band + 1], rows)
        for band in range(bands):
            for hashes, rows in buckets.of(band):
                _mark_near(found, hashes[:, 0], rows, near, texts)
            tell(0.3 + 0.7 * (band + 1) / bands)
    return found


def chunks(parts: Sequence[Path], dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """The records of all parts, some at a time, each time with the number of the first row."""
    first = 0
    for part in parts:
        with part.open("rb") as file:
            while len(records := np.fromfile(file, dtype, CHUNK_ROWS)):
                yield first, records
                first += len(records)


def similar(left: np.ndarray, right: np.ndarray, near: Near, texts: Texts) -> np.ndarray:
    """Whether each pair of rows, left[i] with right[i], reaches the threshold by their whole sets of shingles."""
    result = np.zeros(len(left), bool)
    for first in range(0, len(left), _PAIRS_AT_ONCE):
        pair = slice(first, first + _PAIRS_AT_ONCE)
        rows, at = np.unique(np.concatenate([left[pair], right[pair]]), return_inverse=True)
        hashes, starts = shingles([normalised(text) for text in texts(rows)], near.shingle_words)
        half = len(at) // 2
        result[pair] = jaccard(hashes, starts, at[:half], at[half:]) >= near.threshold
    return result


def _mark_exact(found: Found, hashes: np.ndarray, rows: np.ndarray) -> None:
    hashes, rows = _repeated(hashes, rows)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: rows of one hash stay in order
    hashes, rows = hashes[order], rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
    first = rows[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(rows) else rows
    found.of[rows] = first
    found.kind[rows[~new]] = EXACT


def _mark_near(found: Found, hashes: np.ndarray, rows: np.ndarray, near: Near, texts: Texts) -> None:
    """Compare the rows of each group of equal hashes: all with the first, those left with the second, and so on."""
    alive = found.kind[rows] == DISTINCT
    wide, rows = _repeated(hashes[alive][:, None], rows[alive])
    order = np.argsort(wide[:, 0], kind="stable")
    hashes, rows = wide[order, 0], rows[order]
    for _ in range(LEADERS):
        new = np.ones(len(rows), bool)
        new[1:] = hashes[1:] != hashes[:-1]
        if new.all():
            return
        leaders = rows[np.flatnonzero(new)[np.cumsum(new) - 1]]
        later = ~new
        same = similar(leaders[later], rows[later], near, texts)
        dropped = rows[later][same]
        found.kind[dropped] = NEAR
        found.of[dropped] = leaders[later][same]
        hashes, rows = hashes[later][~same], rows[later][~same]


def _repeated(hashes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries whose first hash occurs more than once; a sort of bare numbers finds them fastest."""
    ordered = np.sort(hashes[:, 0])
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return hashes[:0], rows[:0]
    at = np.minimum(np.searchsorted(repeated, hashes[:, 0]), len(repeated) - 1)
    keep = repeated[at] == hashes[:, 0]
    return hashes[keep], rows[keep]


class _Buckets:
    """Hashes and row numbers on disk, in files by leading bits of the hash, so that one file's fit into memory."""

    def __init__(self, folder: Path, name: str, kinds: int, rows: int, *, words: int) -> None:
        self._dtype = np.dtype([("hash", "<u8", (words,)), ("row", "<u4")])
        self._files = 1
        while self._files * BUCKET_ROWS < rows and 2 * self._files * kinds <= OPEN_FILES:
            self._files *= 2
        self._paths = [[folder / f"{name}-{kind}-{i}.bucket" for i in range(self._files)] for kind in range(kinds)]
        self._open: list[list[BinaryIO]] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Buckets:
        self._open = [[self._stack.enter_context(path.open("wb")) for path in paths] for paths in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for paths in self._paths:
            for path in paths:
                path.unlink(missing_ok=True)

    def add(self, kind: int, hashes: np.ndarray, rows: np.ndarray) -> None:
        entries = np.empty(len(rows), self._dtype)
        entries["hash"], entries["row"] = hashes, rows
        if self._files == 1:
            entries.tofile(self._open[kind][0])
            return
        bucket = (hashes[:, 0] >> np.uint64(65 - self._files.bit_length())).astype(np.uint8)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=self._files))
        for i, piece in enumerate(np.split(entries[order], ends[:-1])):
            piece.tofile(self._open[kind][i])

    def of(self, kind: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(hashes, rows) of each file of a kind; rows ascend. The files are removed as they are read."""
        for path, file in zip(self._paths[kind], self._open[kind], strict=True):
            file.close()
            entries = np.fromfile(path, self._dtype)
            path.unlink()
            yield np.ascontiguousarray(entries["hash"]), np.ascontiguousarray(entries["row"])


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()
