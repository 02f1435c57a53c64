"""Files of a blend cut into units of work, and the rows of one unit, read without holding more than one of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemotron_launch.data_prep.blend import Blend
from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.sources import read_rows
from nemotron_launch.trainer.file_errors import file_error

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment,unused-ignore]

#: Bytes of a JSONL file that are one unit, and bytes of rows of other files that are one part.
UNIT_BYTES = 16 << 20

#: A .json file is read whole, so it may not be large.
_LARGEST_JSON = 256 << 20


@dataclass(frozen=True, slots=True)
class File:
    """A file that rows come from. kind: `jsonl` (cut by bytes), `arrow`, `parquet`, `lines` (compressed) or `table`.

    name: in places, as `name:row`; files of one hub dataset share it, and their rows are numbered through. size and
    changed (nanoseconds) tell whether it is still the same. limit: rows to read at most.
    """

    source: int
    kind: str
    path: str
    name: str
    size: int
    changed: int
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker does at a time: the lines of a file that begin in [begin, end), or all of it (end -1)."""

    number: int
    file: int
    begin: int
    end: int


class Raw(NamedTuple):
    """A row as it was read: at: what tells it apart in its file (byte or number); line: from 1, within the unit.

    data: None where the row cannot be read; problem then says why. size: bytes, about. text: the line, where it is one.
    """

    at: int
    line: int
    data: dict[str, Any] | None
    size: int
    problem: str = ""
    text: bytes = b""


def list_files(blend: Blend, hub: Mapping[tuple[int, int], Sequence[str]]) -> list[File]:
    """Every file, in the blend's order. hub: for (source, entry) of a dataset the Arrow files that it was found in."""
    files = []
    for number, source in enumerate(blend.sources):
        left = source.limit
        for i, entry in enumerate(source.entries):
            paths = [entry.name] if entry.kind == "file" else hub[number, i]
            shown = entry.name if entry.kind == "file" else f"{entry.name}[{source.split}]"
            for path in paths:
                kind = _kind(path) if entry.kind == "file" else "arrow"
                state = Path(path).stat()
                file = File(number, kind, path, shown, state.st_size, state.st_mtime_ns, left)
                if left is not None:
                    if left == 0:
                        break
                    left -= _count(file, left)
                files.append(file)
    return files


def cut(files: Sequence[File]) -> list[Unit]:
    """All files as units, in order."""
    units: list[Unit] = []
    for number, file in enumerate(files):
        if file.kind == "jsonl":
            end = _end_of(file) if file.limit is not None else file.size
            units += [
                Unit(len(units) + i, number, begin, min(begin + UNIT_BYTES, end))
                for i, begin in enumerate(range(0, end, UNIT_BYTES))
            ]
        else:
            units.append(Unit(len(units), number, 0, -1))
    return units


def rows(file: File, unit: Unit) -> Iterator[Raw]:
    """The rows of a unit; a blank line has the size 0. Raises UserError for a file that is damaged as a whole."""
    try:
        if file.kind == "jsonl":
            yield from _jsonl(file, unit)
        elif file.kind == "lines":
            yield from _limited(_compressed(file), file.limit)
        else:
            yield from _limited(_table(file), file.limit)
    except OSError as error:
        raise file_error(error, file.path) from error


def lines_in(file: File, unit: Unit) -> Iterator[bytes]:
    """The lines of a JSONL file that begin in [begin, end)."""
    with Path(file.path).open("rb", buffering=1 << 20) as stream:
        position = unit.begin
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < unit.end:
            line = stream.readline()
            if not line:
                return
            position += len(line)
            yield line


def sha256_of(path: str) -> str:
    """Of a file's bytes."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise file_error(error, path) from error


@dataclass(frozen=True, slots=True)
class Dataset:
    """A saved dataset's folder (kind `saved`) or a hub id (`hub`), one of its configurations and splits."""

    kind: str
    name: str
    subset: str | None
    split: str


def dataset_files(wanted: Sequence[Dataset], cache_dir: str | None, offline: bool) -> list[list[str] | str]:
    """For each dataset its Arrow files, downloaded where needed; or, as a text, why it cannot be had.

    Run it in a process of its own: the library `datasets` takes more memory than all the rest.
    """
    import datasets

    datasets.disable_progress_bars()
    if offline:
        datasets.config.HF_HUB_OFFLINE = True
        datasets.config.HF_DATASETS_OFFLINE = True
    found: list[list[str] | str] = []
    for one in wanted:
        shown = f"{one.name}{f' ({one.subset})' if one.subset else ''}, split {one.split}"
        try:
            if one.kind == "saved":
                data = datasets.load_from_disk(one.name)
                if isinstance(data, datasets.DatasetDict):
                    if one.split not in data:
                        found.append(f"{shown}: there is no such split, only {', '.join(data)}")
                        continue
                    data = data[one.split]
            else:
                data = datasets.load_dataset(one.name, one.subset, split=one.split, cache_dir=cache_dir)
        except Exception as error:  # the hub's client raises its own kinds, the HTTP library's, OSError and ValueError
            why = "not in the local cache, and the hub cannot be reached" if offline else _first_line(error)
            found.append(f"{shown}: {_first_line(error) if one.kind == 'saved' else why}")
            continue
        found.append([str(file["filename"]) for file in data.cache_files])
    return found


def arrow_batches(path: str) -> Iterator[Any]:
    """Record batches of an Arrow file, one at a time; read, not mapped, so that they do not stay in memory."""
    import pyarrow

    try:
        with pyarrow.OSFile(path) as stream:
            try:
                reader = pyarrow.ipc.open_stream(stream)
            except pyarrow.ArrowInvalid:
                stream.seek(0)
                file = pyarrow.ipc.open_file(stream)
                reader = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from reader
    except pyarrow.ArrowException as error:
        raise UserError(f"is no Arrow file ({_first_line(error)})", where=path) from error


# Reading ------------------------------------------------------------------------------------------------------------


def _python_loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _python_dumps(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise ValueError(str(error)) from None


#: JSON as Python's values, and a row as a line of JSON without its end. Both raise ValueError, orjson a subclass of it
#: or TypeError. orjson is five times as fast; an image without it does the same work.
loads: Callable[[bytes], Any] = orjson.loads if orjson else _python_loads
dumps: Callable[[Mapping[str, Any]], bytes] = orjson.dumps if orjson else _python_dumps


def _jsonl(file: File, unit: Unit) -> Iterator[Raw]:
    at = unit.begin
    if at:  # a line's first byte tells it apart wherever the cut is
        with Path(file.path).open("rb") as stream:
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
    for number, line in enumerate(lines_in(file, unit), 1):
        yield Raw(at, number, None, 0) if line.isspace() else _parsed(at, number, line)
        at += len(line)


def _parsed(at: int, number: int, line: bytes) -> Raw:
    if line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    try:
        data = loads(line)
    except ValueError:
        return Raw(at, number, None, len(line), "not valid JSON", line)
    if type(data) is not dict:
        return Raw(at, number, None, len(line), "not a JSON object", line)
    return Raw(at, number, data, len(line), "", line)


def _compressed(file: File) -> Iterator[Raw]:
    for number, line in enumerate(_decompressed(file.path), 1):
        if not line.isspace():
            yield _parsed(number, number, line)


def _decompressed(path: str) -> Iterator[bytes]:
    import zlib

    if path.endswith(".gz"):
        import gzip

        try:
            with gzip.open(path) as stream:
                yield from stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"is no gzip file ({error})", where=path) from error
        return
    zstandard = need_zstandard(path)
    try:
        with Path(path).open("rb") as packed:
            reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
            yield from io.BufferedReader(reader, 1 << 20)
    except zstandard.ZstdError as error:
        raise UserError(f"is no zstd file ({error})", where=path) from error


def need_zstandard(where: str) -> Any:
    """The module, or a message that says how to get it."""
    try:
        import zstandard
    except ImportError:
        raise UserError(
            "zstd needs the package zstandard, which is not installed",
            where=where,
            hint="pip install zstandard, or set compression=none",
            exit_code=1,
        ) from None
    return zstandard


def _table(file: File) -> Iterator[Raw]:
    if file.kind in ("arrow", "parquet"):
        batches = arrow_batches(file.path) if file.kind == "arrow" else _parquet_batches(file.path)
        number = 0
        for batch in batches:
            size = max(batch.nbytes // max(batch.num_rows, 1), 1)
            for first in range(0, batch.num_rows, 256):
                for row in batch.slice(first, 256).to_pylist():
                    number += 1
                    yield Raw(number, number, row, size)
        return
    if file.path.endswith(".json") and file.size > _LARGEST_JSON:
        raise UserError(
            f"is a JSON file of {file.size >> 20} MiB, which would be read whole",
            where=file.path,
            hint="write one row a line, as .jsonl",
        )
    for number, row in enumerate(read_rows({"data_path": file.path}, step_dir=None, key=file.name), 1):
        line = int(row.place.rpartition(":")[2])
        data = None if row.data is None else dict(row.data)
        yield Raw(number, line, data, len(str(row.data)), row.problem or "")


def _parquet_batches(path: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(1024)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"is no Parquet file ({_first_line(error)})", where=path) from error


def _limited(raws: Iterator[Raw], limit: int | None) -> Iterator[Raw]:
    for count, raw in enumerate(raws):
        if limit is not None and count >= limit:
            return
        yield raw


def _kind(path: str) -> str:
    if path.endswith(".jsonl"):
        return "jsonl"
    if path.endswith((".gz", ".zst")):
        return "lines"
    return Path(path).suffix[1:] if path.endswith((".parquet", ".arrow")) else "table"


def _count(file: File, most: int) -> int:
    """Rows of a file, at most so many."""
    unit = Unit(0, 0, 0, file.size if file.kind == "jsonl" else -1)
    if file.kind == "jsonl":
        found = (line for line in lines_in(file, unit) if not line.isspace())
        return sum(1 for _, _ in zip(range(most), found, strict=False))
    return sum(1 for _ in _limited(rows(file, unit), most))


def _end_of(file: File) -> int:
    """Where the file's last row that the limit allows ends."""
    end = count = 0
    for line in lines_in(file, Unit(0, 0, 0, file.size)):
        if count == file.limit:
            break
        count += not line.isspace()
        end += len(line)
    return end


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
