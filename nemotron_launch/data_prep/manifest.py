"""What is left of a preparation beside its shards: manifest.json, quarantine.jsonl and dropped.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.data_prep.blend import Blend
from nemotron_launch.data_prep.selection import (
    EXACT,
    FATES,
    LEAKAGE,
    NEAR,
    TOO_LONG,
    TRAIN,
    VALIDATION,
    Part,
    Selection,
)
from nemotron_launch.data_prep.sources import File, Unit
from nemotron_launch.data_prep.units import INDEX, marks, name_of, read_array

FORMAT = 1
MANIFEST, QUARANTINE, DROPPED = "manifest.json", "quarantine.jsonl", "dropped.jsonl"
BAD = "bad_row"
#: Reasons that dropped.jsonl has row by row; the others are draws by weight or max_rows, or in the quarantine.
_LISTED = (EXACT, NEAR, LEAKAGE, TOO_LONG)


def parts_of(folder: Path, units: Sequence[Unit], files: Sequence[File]) -> list[Part]:
    """All parts of the first pass, in the order of the sources."""
    parts: list[Part] = []
    first = 0
    for unit, mark, line in _with_lines(folder, units, files):
        file = files[unit.file]
        for i, part in enumerate(mark["parts"]):
            name = f"{name_of(unit)}-{i:04d}"
            parts.append(Part(name, file.source, file.name, line, first, part["rows"], part["entries"]))
            first += part["rows"]
    return parts


def write_quarantine(
    path: Path, folder: Path, units: Sequence[Unit], files: Sequence[File], blend: Blend
) -> Counter[str]:
    """Write every bad row with its place and reason; how many there are of each reason."""
    reasons: Counter[str] = Counter()
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for unit, mark, line in _with_lines(folder, units, files):
            if not mark["reasons"]:
                continue
            reasons.update(mark["reasons"])
            file = files[unit.file]
            with (folder / f"{name_of(unit)}.bad").open(encoding="utf-8") as stream:
                for row in map(json.loads, stream):
                    place = f"{file.name}:{line + row['line']}"
                    said = {"place": place, "source": blend.sources[file.source].name, "reason": row["reason"]}
                    out.write(json.dumps({**said, "row": row["row"]}, ensure_ascii=False) + "\n")
    return reasons


def write_dropped(path: Path, folder: Path, parts: Sequence[Part], chosen: Selection) -> None:
    """Write of every duplicate, leak and overlong row where it was, why it is left out, and which row it repeats."""
    firsts = np.array([part.first for part in parts], np.int64)
    repeated = np.unique(chosen.of[np.isin(chosen.fate, _LISTED)])
    lines = _lines_of(repeated, folder, parts)
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for part in parts:
            fate = chosen.fate[part.first : part.first + part.rows]
            rows = np.flatnonzero(np.isin(fate, _LISTED))
            if not len(rows):
                continue
            own = part.line + read_array(folder / f"{part.name}.index", INDEX)["line"][rows].astype(np.int64)
            of = chosen.of[part.first + rows]
            others = (np.searchsorted(firsts, of, side="right") - 1).tolist()
            other_lines = lines[np.searchsorted(repeated, of)].tolist()
            for line, code, i, other_line in zip(own.tolist(), fate[rows].tolist(), others, other_lines, strict=True):
                said = {"place": f"{part.place}:{line}", "reason": FATES[code]}
                if code != TOO_LONG:
                    said["of"] = f"{parts[i].place}:{other_line}"
                out.write(json.dumps(said, ensure_ascii=False) + "\n")


def _lines_of(rows: np.ndarray, folder: Path, parts: Sequence[Part]) -> np.ndarray:
    """Lines (int64, N) of rows (ascending) in their files."""
    lines = np.zeros(len(rows), np.int64)
    for part in parts:
        begin, end = np.searchsorted(rows, [part.first, part.first + part.rows])
        if begin < end:
            index = read_array(folder / f"{part.name}.index", INDEX)
            lines[begin:end] = part.line + index["line"][rows[begin:end].astype(np.int64) - part.first].astype(np.int64)
    return lines


def counts_of(
    folder: Path, units: Sequence[Unit], files: Sequence[File], parts: Sequence[Part], chosen: Selection, blend: Blend
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counts of all rows and of each source's: read + repeated = kept + all that was dropped."""
    by_source = [Counter[str]() for _ in blend.sources]
    for unit, mark in marks(folder, units):
        own = by_source[files[unit.file].source]
        own["read"] += mark["read"]
        own[BAD] += sum(mark["reasons"].values())
    for part in parts:
        own, rows = by_source[part.source], slice(part.first, part.first + part.rows)
        fate, copies = chosen.fate[rows], chosen.copies[rows]
        for code, number in enumerate(np.bincount(fate, minlength=len(FATES)).tolist()):
            own[FATES[code]] += number
        taken = int(copies[fate == TRAIN].sum())
        own["repeated"] += taken - own_count(fate, TRAIN)
    whole: Counter[str] = sum(by_source, Counter())
    return _counts(whole), [_counts(own) for own in by_source]


def own_count(fate: np.ndarray, code: int) -> int:
    return int(np.count_nonzero(fate == code))


def _counts(counted: Counter[str]) -> dict[str, Any]:
    names = (BAD, *FATES[VALIDATION + 1 :])
    train = counted[FATES[TRAIN]] + counted["repeated"]
    return {
        "read": counted["read"],
        "kept": train + counted[FATES[VALIDATION]],
        "train": train,
        "validation": counted[FATES[VALIDATION]],
        "repeated": counted["repeated"],
        "dropped": {name: counted[name] for name in names if counted[name]},
    }


def sources_of(
    blend: Blend, files: Sequence[File], hashes: Sequence[str], counts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What the manifest says of each source."""
    listed = []
    for number, source in enumerate(blend.sources):
        own = [
            {"path": file.name, "bytes": file.size, "sha256": digest}
            for file, digest in zip(files, hashes, strict=True)
            if file.source == number
        ]
        listed.append({**source.meaning(), "files": own, "counts": counts[number]})
    return listed


def _with_lines(
    folder: Path, units: Sequence[Unit], files: Sequence[File]
) -> Iterator[tuple[Unit, dict[str, Any], int]]:
    """Every unit with its mark and the number of lines that come before it under the same name."""
    name, before = (-1, ""), 0
    for unit, mark in marks(folder, units):
        file = files[unit.file]
        if (file.source, file.name) != name:
            name, before = (file.source, file.name), 0
        yield unit, mark, before
        before += mark["lines"]
