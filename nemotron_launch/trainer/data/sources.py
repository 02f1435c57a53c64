"""Rows of training data, each with its file and line: jsonl, json, csv, parquet, arrow, saved datasets, the hub.

pyarrow and datasets are imported only for the formats that need them.
"""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.manifest import KEY, read_manifest, shards_of
from nemotron_launch.trainer.paths import hub_is_offline, is_hub_id, resolve_path

#: Data sets that NeMo-RL knows by name: hub id, subset, and the split of those that have one only; used where no
#: data_path is given. AIME 2025 and 2026 are both parts of the year's contest.
NAMED_DATASETS: Mapping[str, tuple[str, str | None, str | None]] = {
    "HelpSteer3": ("nvidia/HelpSteer3", "preference", None),
    "Tulu3Preference": ("allenai/llama-3.1-tulu-3-8b-preference-mixture", None, None),
    "gsm8k": ("openai/gsm8k", "main", None),
    "OpenMathInstruct-2": ("nvidia/OpenMathInstruct-2", None, None),
    "DAPOMath17K": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"),
    "DeepScaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"),
    "AIME2024": ("HuggingFaceH4/aime_2024", None, "train"),
    "AIME2025": ("MathArena/aime_2025", None, "train"),
    "AIME2026": ("MathArena/aime_2026", None, "train"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row. place: `file:line`, or the row's number (from 1) where a format has no lines.

    data is None where the row cannot be read; problem then says why.
    """

    place: str
    data: Mapping[str, Any] | None
    problem: str | None = None


class BadRow(Exception):
    """Why one row cannot be used, in words that other rows may share; `BadRows` counts them."""


class BadRows:
    """How many rows were read and which were left out, why and where. Places are kept for the first few of a reason."""

    PLACES_KEPT = 3

    def __init__(self) -> None:
        self.total = 0
        self.overlong = 0
        self.counts: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < self.PLACES_KEPT:
            places.append(place)

    @property
    def bad(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line a reason, the most frequent first: `12 × missing key chosen: a.jsonl:3, a.jsonl:9, …`."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            f"{count} × {reason}: {', '.join(self.places[reason])}{', …' if count > len(self.places[reason]) else ''}"
            for reason, count in ranked
        ]

    def summary(self) -> str:
        """What the log should say, one line a fact; empty if every row is used in full."""
        lines = [f"{self.bad} of {self.total} rows left out", *self.lines()] if self.bad else []
        if self.overlong:
            lines.append(
                f"{self.overlong} of {self.total} rows are longer than the limit: kept in batches, out of the loss"
            )
        return "\n".join(lines)

    def stop_if_too_many(self, max_share: float, *, key: str) -> None:
        """Raise UserError if there are no rows, none that can be used, or more bad ones than `max_share` (0 to 1)."""
        if not self.total:
            raise UserError("the data holds no rows", where=key)
        if self.bad == self.total:
            raise UserError(f"none of the {self.total} rows can be used", where=key, hint="\n".join(self.lines()))
        if self.bad > max_share * self.total:
            share = f"{100 * self.bad / self.total:.3g}% where max_bad_rows allows {100 * max_share:.3g}%"
            raise UserError(
                f"{self.bad} of {self.total} rows are bad: {share}",
                where=key,
                hint="\n".join([*self.lines(), "correct these rows, or allow a larger share with max_bad_rows"]),
            )


def data_section(data: Mapping[str, Any], own: Mapping[str, Any] | None, *, split: str) -> dict[str, Any]:
    """One of the config's data sections, complete: what it leaves out (or null) comes from data.default.

    split: train or validation: what a split that neither names stands for, and which rows of `data.manifest_path` are
    taken where no data_path is named.
    """
    named = {name: value for name, value in (own or {}).items() if value is not None}
    filled = {"cache_dir": data.get("cache_dir"), **(data.get("default") or {}), **named}
    if data.get("manifest_path") and not filled.get("data_path"):
        allowed = bool(data.get("allow_train_as_validation"))
        filled["manifest"] = {"path": data["manifest_path"], "rows": split, "allow_train": allowed}
    return {**filled, "split": filled.get("split") or split}


def read_rows(section: Mapping[str, Any], *, step_dir: Path | None, key: str) -> Iterator[Row]:
    """Rows of one data section, in file order.

    section: `data_path` (a file, glob, saved dataset's folder or hub id, or a list of these; `step://x` is inside
    `step_dir`), or a `dataset_name` of NAMED_DATASETS, or `manifest` (see `data_section`); `subset` and `split`
    (default train) choose within the hub's and saved datasets, `cache_dir` is where the hub's are kept. Blank lines are
    skipped; a row that cannot be read comes with its problem. Raises UserError for data that is missing or of an
    unknown kind.
    """
    where = f"{key}.data_path"
    split, subset, cache = section.get("split") or "train", section.get("subset"), section.get("cache_dir")
    given = section.get("data_path")
    if chosen := section.get("manifest"):
        manifest = read_manifest(resolve_path(chosen["path"], step_dir, KEY))
        for shard in shards_of(manifest, chosen["rows"], allow_train=chosen["allow_train"]):
            for file in _files(shard.path, KEY):
                yield from _READERS[file.suffix](file, KEY)
        return
    if not given:
        name = section.get("dataset_name") or ""
        if name not in NAMED_DATASETS:
            raise UserError("no data is named", where=where, hint="give the path of a file, or a hub id")
        hub_id, own_subset, only_split = NAMED_DATASETS[name]
        yield from _hub_rows(hub_id, subset or own_subset, only_split or split, cache, where)
        return
    for entry in [given] if isinstance(given, str) else given:
        path = resolve_path(entry, step_dir, where)
        if is_hub_id(entry) and path.suffix not in _READERS:
            yield from _hub_rows(entry, subset, split, cache, where)
        elif path.is_dir():
            yield from _saved_rows(path, split, where)
        else:
            for file in _files(path, where):
                yield from _READERS[file.suffix](file, where)


def _files(path: Path, where: str) -> list[Path]:
    files = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if not file.is_dir()]
    if not files:
        what = "no file matches" if glob.has_magic(str(path)) else "no such file:"
        raise UserError(f"{what} {path}", where=where, hint=None if path.is_absolute() else f"looked in {Path.cwd()}")
    for file in files:
        if file.suffix not in _READERS:
            raise UserError(
                f"{file}: data of this kind cannot be read",
                where=where,
                hint=f"known are {', '.join(sorted(_READERS))}",
            )
    return files


def _jsonl_rows(path: Path, where: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        yield from _json_lines(path, lines)


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            yield _json_row(f"{path}:{number}", line)


def _zstd_rows(path: Path, where: str) -> Iterator[Row]:
    """JSON lines in a Zstandard file of one or more frames."""
    if path.suffixes[-2:] != [".jsonl", ".zst"]:
        raise UserError(f"{path}: of .zst files, only .jsonl.zst can be read", where=where)
    import zstandard

    try:
        yield from _json_lines(path, _zstd_lines(path))
    except (zstandard.ZstdError, EOFError) as error:
        raise UserError(f"{path} is no whole Zstandard file ({error})", where=where) from error


def _zstd_lines(path: Path) -> Iterator[bytes]:
    import zstandard

    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    with path.open("rb") as file:
        while data := file.read(1 << 18):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(data)).split(b"\n")
                yield from lines
                data = frame.unused_data
    if not frame.eof:
        raise EOFError("it ends within a frame")
    if rest:
        yield rest


def _json_row(place: str, line: bytes) -> Row:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return Row(place, None, "not valid JSON")
    return _object_row(place, data)


def _object_row(place: str, data: Any) -> Row:
    return Row(place, data) if isinstance(data, dict) else Row(place, None, "not a JSON object")


def _json_rows(path: Path, where: str) -> Iterator[Row]:
    try:
        whole = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf") or b"[]")
    except (ValueError, RecursionError):
        yield from _jsonl_rows(path, where)  # many .json files are JSON lines
        return
    for number, data in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield _object_row(f"{path}:{number}", data)


def _csv_rows(path: Path, where: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text)
        header: list[str] | None = None
        last = 0
        try:
            for fields in reader:
                place, last = f"{path}:{last + 1}", reader.line_num
                if header is None:
                    header = fields or None
                elif fields and len(fields) != len(header):
                    yield Row(place, None, f"{len(fields)} fields under a header of {len(header)}")
                elif fields:
                    yield Row(place, dict(zip(header, fields, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"not CSV in UTF-8 from here on ({error})", where=f"{path}:{last + 1}") from error


def _parquet_rows(path: Path, where: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(path, (row for batch in file.iter_batches(1024) for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file ({_first_line(error)})", where=where) from error


def _arrow_rows(path: Path, where: str) -> Iterator[Row]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                batches = iter(pyarrow.ipc.open_stream(mapped))
            except pyarrow.ArrowInvalid:
                file = pyarrow.ipc.open_file(mapped)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Arrow file ({_first_line(error)})", where=where) from error


def _saved_rows(folder: Path, split: str, where: str) -> Iterator[Row]:
    """Rows of a folder that `datasets` wrote with save_to_disk."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise UserError(
            f"{folder} is a folder, but no saved dataset", where=where, hint=f"for its files, write {folder}/*.jsonl"
        )
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(folder))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{folder} has no split {split}", where=where, hint=f"it has {', '.join(data)}")
        data = data[split]
    yield from _dataset_rows(str(folder), data)


def _hub_rows(hub_id: str, subset: str | None, split: str, cache: str | None, where: str) -> Iterator[Row]:
    import datasets

    offline = hub_is_offline()
    if offline:  # the client would retry for a while; its cache is still looked at
        datasets.config.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(hub_id, subset, split=split, cache_dir=cache)
    except Exception as error:  # the hub's client raises its own kinds, the HTTP library's, OSError and ValueError
        known = (
            "it is no file here, not in the local cache, and the hub cannot be reached"
            if offline
            else _first_line(error)
        )
        raise UserError(
            f"no dataset {hub_id}{f' ({subset})' if subset else ''}, split {split}", where=where, hint=known
        ) from error
    yield from _dataset_rows(hub_id, data)


def _dataset_rows(name: str, data: Any) -> Iterator[Row]:
    tables = data.with_format("arrow").iter(batch_size=1024)
    return _numbered(name, (row for table in tables for row in table.to_pylist()))


def _numbered(name: str | Path, rows: Iterator[Mapping[str, Any]]) -> Iterator[Row]:
    return (Row(f"{name}:{number}", row) for number, row in enumerate(rows, 1))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_READERS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".zst": _zstd_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
