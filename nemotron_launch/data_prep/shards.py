"""The second pass: parts become shards. Every part is in the order of its keys, so a shard is merged range by range.

A shard holds the rows of a range of prefixes of the keys, cut so that shards have nearly the same number of rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.data_prep.selection import TRAIN, VALIDATION, Part, Selection
from nemotron_launch.data_prep.sources import need_zstandard
from nemotron_launch.data_prep.units import ORDER, PREFIX_BITS, PREFIXES, TABLE, read_array

#: Bytes of parts that are merged at once, where a single prefix does not hold more.
RANGE_BYTES = 16 << 20

#: Rows of a range of which so few bytes are wanted are read one by one.
_SPARSE = 8
_ROWS_AT_ONCE = 4096
_SKIPPED, _TRAIN, _VALIDATION = 0, 1, 2
SPLITS = {"train": _TRAIN, "validation": _VALIDATION}


@dataclass(frozen=True)
class Counts:
    """Rows and bytes of each split, by prefix of the key (int64, PREFIXES); stored: bytes of the parts, by prefix."""

    rows: dict[str, np.ndarray]
    bytes: dict[str, np.ndarray]
    stored: np.ndarray


@dataclass(frozen=True)
class Shard:
    """A shard to write: the prefixes that it spans, cut into ranges that fit into memory."""

    split: str
    name: str
    ranges: tuple[tuple[int, int], ...]
    rows: int
    zstd: bool


@dataclass(frozen=True)
class Written:
    """A shard that was written."""

    rows: int
    bytes: int
    sha256: str


def mark_entries(parts: Sequence[Part], folder: Path, chosen: Selection) -> Counts:
    """Write for each part `name.take`, the split of every entry of name.order, and count."""
    rows = {split: np.zeros(PREFIXES, np.int64) for split in SPLITS}
    sizes = {split: np.zeros(PREFIXES, np.int64) for split in SPLITS}
    stored = np.zeros(PREFIXES, np.int64)
    for part in parts:
        order = read_array(folder / f"{part.name}.order", ORDER)
        fate = chosen.fate[part.first : part.first + part.rows][order["row"]]
        copies = chosen.copies[part.first : part.first + part.rows][order["row"]]
        take = np.zeros(len(order), np.uint8)
        take[(fate == TRAIN) & (order["copy"] < copies)] = _TRAIN
        take[(fate == VALIDATION) & (order["copy"] == 0)] = _VALIDATION
        take.tofile(folder / f"{part.name}.take")
        prefix = (order["key"] >> np.uint64(64 - PREFIX_BITS)).astype(np.int64)
        for split, code in SPLITS.items():
            own = take == code
            rows[split] += np.bincount(prefix[own], minlength=PREFIXES)
            sizes[split] += np.bincount(prefix[own], order["size"][own], PREFIXES).astype(np.int64)
        stored += np.bincount(prefix, order["size"], PREFIXES).astype(np.int64)
    return Counts(rows, sizes, stored)


def plan(counts: Counts, shards: int, *, zstd: bool) -> list[Shard]:
    """The shards of both splits: `shards` of each that has rows, but none without rows."""
    planned = []
    for split, by_prefix in counts.rows.items():
        total = int(by_prefix.sum())
        number = min(shards, total)
        ends = np.cumsum(by_prefix)
        bounds = [0]
        for i in range(1, number):
            wanted = total * i / number
            at = int(np.searchsorted(ends, wanted))
            if at and wanted - ends[at - 1] < ends[at] - wanted:
                at -= 1
            bounds.append(max(at + 1, bounds[-1]))
        spans = [(a, b) for a, b in zip(bounds, [*bounds[1:], PREFIXES], strict=True) if by_prefix[a:b].sum()]
        for i, (begin, end) in enumerate(spans if total else []):
            name = f"{split}-{i:05d}-of-{len(spans):05d}.jsonl{'.zst' if zstd else ''}"
            rows = int(by_prefix[begin:end].sum())
            planned.append(Shard(split, name, tuple(_ranges(counts.stored, begin, end)), rows, zstd))
    return planned


def write(shard: Shard, parts: Sequence[str], folder: Path) -> Written:
    """Merge a shard's rows into the file of its name in `folder`, all of it or none."""
    path = folder / shard.name
    temporary = folder / f".{shard.name}.{os.getpid()}"
    digest, rows = hashlib.sha256(), 0
    compressor = need_zstandard("compression").ZstdCompressor(level=3).compressobj() if shard.zstd else None
    with temporary.open("wb") as stream:

        def put(data: bytes) -> None:
            digest.update(data)
            stream.write(data)

        for begin, end in shard.ranges:
            data, starts, sizes = _range(parts, folder, SPLITS[shard.split], begin, end)
            rows += len(starts)
            view = memoryview(data)
            ends = (starts + sizes).tolist()
            pairs = list(zip(starts.tolist(), ends, strict=True))
            for first in range(0, len(pairs), _ROWS_AT_ONCE):
                joined = b"".join([view[a:b] for a, b in pairs[first : first + _ROWS_AT_ONCE]])
                put(compressor.compress(joined) if compressor else joined)
        if compressor:
            put(compressor.flush())
        size = stream.tell()
    temporary.replace(path)
    return Written(rows, size, digest.hexdigest())


def _range(
    parts: Sequence[str], folder: Path, code: int, begin: int, end: int
) -> tuple[bytearray, np.ndarray, np.ndarray]:
    """Rows of a range of prefixes: their bytes, and where each begins (int64) and its size, by ascending key."""
    slices = []
    for name in parts:
        (first, first_byte), (last, last_byte) = (
            read_array(folder / f"{name}.table", TABLE, prefix, 1)[0].tolist() for prefix in (begin, end)
        )
        if first == last:
            continue
        take = read_array(folder / f"{name}.take", np.dtype(np.uint8), first, last - first) == code
        if not take.any():
            continue
        order = read_array(folder / f"{name}.order", ORDER, first, last - first)
        offset = np.cumsum(order["size"], dtype=np.int64)[take] - order["size"][take]
        slices.append((name, first_byte, last_byte - first_byte, order[take], offset))
    data = bytearray(sum(_wanted(size, order) for _, _, size, order, _ in slices))
    view = memoryview(data)
    keys: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    filled = 0
    for name, begins, size, order, offset in slices:
        own = order["size"].astype(np.int64)
        with (folder / f"{name}.rows").open("rb", buffering=0) as stream:
            if _wanted(size, order) < size:
                starts.append(filled + np.cumsum(own) - own)
                for at, length in zip(offset.tolist(), own.tolist(), strict=True):
                    filled += os.preadv(stream.fileno(), [view[filled : filled + length]], begins + at)
            else:
                starts.append(filled + offset)
                filled += os.preadv(stream.fileno(), [view[filled : filled + size]], begins)
        keys.append(order["key"])
        sizes.append(own)
    if not keys:
        return data, np.zeros(0, np.int64), np.zeros(0, np.int64)
    by_key = np.argsort(np.concatenate(keys), kind="stable")
    return data, np.concatenate(starts)[by_key], np.concatenate(sizes)[by_key]


def _wanted(size: int, order: np.ndarray) -> int:
    """Bytes to read of a slice: all of it, or only the rows that are taken where these are few."""
    taken = int(order["size"].sum())
    return taken if taken * _SPARSE < size else size


def _ranges(stored: np.ndarray, begin: int, end: int) -> Any:
    first, size = begin, 0
    for prefix in range(begin, end):
        if size and size + int(stored[prefix]) > RANGE_BYTES:
            yield first, prefix
            first, size = prefix, 0
        size += int(stored[prefix])
    yield first, end
