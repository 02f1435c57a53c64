"""The first pass: one unit of input becomes parts, rows of the target in their shuffled order with what tells of them.

Of a part `name`, all in the work folder:
  name.rows    the rows, one a line, by ascending key; a row that is taken several times is there several times
  name.order   ORDER, an entry a line of name.rows
  name.index   INDEX, an entry a row, in the order of the source; rows of one prompt have one draw
  name.table   TABLE, where each prefix of the keys begins in name.rows
  name.whole, name.asked    records of `duplicates` of each row's text and of its prompt, in the order of the source
and of a unit its name.bad (quarantined rows) and name.json, written last: with it the unit is done.

A row's key is a hash of the seed and of where the row begins in its file, so it does not depend on how files are cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.data_prep import duplicates, sources
from nemotron_launch.data_prep.blend import Reference, Source
from nemotron_launch.data_prep.lengths import TokenCounter, load_counter
from nemotron_launch.data_prep.minhash import Near
from nemotron_launch.data_prep.placeholders import Placeholders, Unresolved
from nemotron_launch.data_prep.rows import Prepared, preparer
from nemotron_launch.data_prep.sources import File, Raw, Unit
from nemotron_launch.trainer.data.sources import BadRow

INDEX = np.dtype(
    [("key", "<u8"), ("draw", "<u8"), ("offset", "<u8"), ("line", "<u4"), ("size", "<u4"), ("tokens", "<u4")]
)
ORDER = np.dtype([("key", "<u8"), ("row", "<u4"), ("size", "<u4"), ("copy", "u1")])
TABLE = np.dtype([("entry", "<u4"), ("byte", "<u8")])

_SUFFIXES = ("rows", "order", "index", "table", "whole", "asked")

#: Keys are looked up by so many leading bits.
PREFIX_BITS = 11
PREFIXES = 1 << PREFIX_BITS

#: Characters whose signatures are computed at once; more would only take memory.
_TEXT_AT_ONCE = 1 << 20

#: Characters of a bad row that the quarantine keeps.
_BAD_SHOWN = 2000


@dataclass(frozen=True)
class Task:
    """What the first pass does with every unit.

    by, near: how rows are compared; with_whole, with_asked: whether rows, and their prompts, are compared at all.
    """

    target: str
    sources: tuple[Source, ...]
    files: tuple[File, ...]
    folder: Path
    seed: int
    by: str = "row"
    near: Near | None = None
    with_whole: bool = True
    with_asked: bool = True
    tokenizer: Mapping[str, Any] | None = None
    step_dir: Path | None = None
    resolve: bool = True
    references: Mapping[str, Reference] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What became of a unit. needs: public datasets that nobody has given, and how many of its rows name each; a unit
    with such rows is not done."""

    unit: Unit
    needs: Mapping[str, int]


def name_of(unit: Unit) -> str:
    return f"{unit.number:06d}"


def mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood 2014), uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: np.ndarray = values ^ (values >> np.uint64(31))
    return result


def salted(values: np.ndarray, *salts: int) -> np.ndarray:
    """Values (uint64) hashed with numbers that make each use its own."""
    for salt in salts:
        values = mixed(values ^ mixed(np.array([salt + 0x9E3779B9], np.uint64)))
    return values


class Worker:
    """Does units, one after the other, and keeps what they share: the tokenizer, the public datasets."""

    def __init__(self, task: Task, datasets: Mapping[str, Sequence[str]]) -> None:
        self._task = task
        self._placeholders = Placeholders(task.references, datasets) if task.resolve else None
        self._prepare = [preparer(task.target, source) for source in task.sources]

    @cached_property
    def _counter(self) -> TokenCounter | None:
        # Not where the process begins: there nobody could hear what is wrong with it.
        return load_counter(self._task.tokenizer, step_dir=self._task.step_dir) if self._task.tokenizer else None

    def do(self, unit: Unit) -> Done:
        """Read a unit and write its parts. Raises UserError for a file that is damaged as a whole."""
        task = self._task
        file = task.files[unit.file]
        source = task.sources[file.source]
        prepare = self._prepare[file.source]
        part = _Part(task, file, unit, source, self._counter)
        bad_path = task.folder / f".{name_of(unit)}.bad.{os.getpid()}"
        read = lines = 0
        reasons: dict[str, int] = {}
        needs: dict[str, int] = {}
        parts: list[dict[str, int]] = []
        with bad_path.open("wb") as bad:
            for raw in sources.rows(file, unit):
                lines = raw.line
                if not raw.size:  # a blank line
                    continue
                read += 1
                try:
                    prepared = self._prepared(raw, prepare)
                    part.add(raw, prepared, _line(prepared.data))
                except Unresolved as open_one:
                    needs[open_one.dataset] = needs.get(open_one.dataset, 0) + 1
                except BadRow as problem:
                    reason = str(problem)
                    reasons[reason] = reasons.get(reason, 0) + 1
                    bad.write(_quarantined(raw, reason))
                if part.size >= sources.UNIT_BYTES and unit.end < 0:
                    parts.append(part.write(f"{name_of(unit)}-{len(parts):04d}"))
                    part = _Part(task, file, unit, source, self._counter)
        bad_path.replace(task.folder / f"{name_of(unit)}.bad")
        if not needs:
            parts.append(part.write(f"{name_of(unit)}-{len(parts):04d}"))
            mark = {"parts": parts, "read": read, "lines": lines, "reasons": reasons}
            write_whole(task.folder / f"{name_of(unit)}.json", json.dumps(mark).encode())
        return Done(unit, needs)

    def _prepared(self, raw: Raw, prepare: Callable[[dict[str, Any]], Prepared]) -> Prepared:
        if raw.data is None:
            raise BadRow(raw.problem)
        data = raw.data
        if "_hf_placeholder" in data and data["_hf_placeholder"] is not None:
            if self._placeholders is None:
                raise BadRow("only names a row of a public dataset (resolve_hf_placeholders is false)")
            data = self._placeholders.filled(data)
        try:
            return prepare(data)
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # Of millions of rows one may hold what nobody thought of; it is that row's fault alone.
            raise BadRow(f"cannot be understood ({type(error).__name__}: {str(error)[:80]})") from error


class _Part:
    """Rows that will be sorted and written together."""

    def __init__(self, task: Task, file: File, unit: Unit, source: Source, counter: TokenCounter | None) -> None:
        self._task, self._file, self._unit, self._source, self._counter = task, file, unit, source, counter
        self._lines: list[bytes] = []
        self._at: list[int] = []
        self._numbers: list[int] = []
        self._waiting: list[Prepared] = []
        self._waiting_size = 0
        self._whole: list[np.ndarray] = []
        self._asked: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self.size = 0

    def add(self, raw: Raw, prepared: Prepared, line: bytes) -> None:
        self._lines.append(line)
        self._at.append(raw.at)
        self._numbers.append(raw.line)
        self.size += len(line)
        self._waiting.append(prepared)
        self._waiting_size += len(line)
        if self._waiting_size >= _TEXT_AT_ONCE:
            self._sign()

    def write(self, name: str) -> dict[str, int]:
        """Write the part's files; what the mark says of it."""
        self._sign()
        task, folder = self._task, self._task.folder
        rows = len(self._lines)
        sizes = np.fromiter((len(line) for line in self._lines), np.uint32, rows)
        at = np.array(self._at, np.uint64)
        copies = -int(-self._source.weight // 1) if self._source.use == "train" else 1
        key = salted(at, task.seed, self._unit.file)
        entries = np.zeros(rows * copies, ORDER)
        for copy in range(copies):
            of_copy = entries[copy * rows : (copy + 1) * rows]
            of_copy["key"] = salted(key, copy) if copy else key
            of_copy["row"], of_copy["size"], of_copy["copy"] = np.arange(rows), sizes, copy
        entries = entries[np.argsort(entries["key"], kind="stable")]
        ends = np.cumsum(entries["size"], dtype=np.uint64)
        index = np.zeros(rows, INDEX)
        first = entries["copy"] == 0
        index["offset"][entries["row"][first]] = (ends - entries["size"])[first]
        index["key"], index["line"], index["size"] = key, self._numbers, sizes
        if task.with_asked and rows:
            asked = np.concatenate(self._asked)
            index["draw"] = salted(np.ascontiguousarray(asked["exact"][:, 0]), task.seed, 1)
        else:
            index["draw"] = salted(key, 1)
        if self._tokens:
            index["tokens"] = np.concatenate(self._tokens)
        prefixes = entries["key"] >> np.uint64(64 - PREFIX_BITS)
        table = np.zeros(PREFIXES + 1, TABLE)
        table["entry"] = np.searchsorted(prefixes, np.arange(PREFIXES + 1, dtype=np.uint64))
        table["byte"] = np.concatenate([[0], ends]).astype(np.uint64)[table["entry"]]
        # Renamed when they are whole: a worker whose run was killed may still write while the next one reads.
        mine = {suffix: folder / f".{name}.{suffix}.{os.getpid()}" for suffix in _SUFFIXES}
        with mine["rows"].open("wb") as stream:
            order = entries["row"].tolist()
            for begin in range(0, len(order), 4096):
                stream.write(b"".join([self._lines[i] for i in order[begin : begin + 4096]]))
        for suffix, array in (("order", entries), ("index", index), ("table", table)):
            array.tofile(mine[suffix])
        for suffix, records in (("whole", self._whole), ("asked", self._asked)):
            with mine[suffix].open("wb") as stream:
                for one in records:
                    one.tofile(stream)
        for suffix, path in mine.items():
            path.replace(folder / f"{name}.{suffix}")
        return {"rows": rows, "entries": len(entries), "bytes": int(ends[-1]) if len(ends) else 0}

    def _sign(self) -> None:
        """Signatures and token counts of the rows that wait for them."""
        rows, self._waiting, self._waiting_size = self._waiting, [], 0
        if not rows:
            return
        task = self._task
        prompts = [row.prompt for row in rows]
        answers = [row.said for row in rows]
        apart = answers if task.near and not rows[0].trained else None
        if task.with_whole and task.with_asked and task.by == "row":
            whole, asked = duplicates.row_signatures(prompts, answers, task.near, apart=apart)
            self._whole.append(whole)
            self._asked.append(asked)
        else:
            if task.with_whole:
                texts = prompts if task.by == "prompt" else [row.text for row in rows]
                self._whole.append(duplicates.signatures(texts, task.near, apart=apart))
            if task.with_asked:
                self._asked.append(duplicates.signatures(prompts, task.near))
        if self._counter is not None:
            self._tokens.append(_token_counts(self._counter, rows))


def _token_counts(counter: TokenCounter, rows: Sequence[Prepared]) -> np.ndarray:
    """Tokens of each row's longest sequence: the prompt, and the longest answer that is trained on, with its end."""
    texts: list[str] = []
    for row in rows:
        try:
            texts.append(counter.conversation(row.messages, tools=row.data.get("tools"), add_generation_prompt=True))
        except ValueError:
            texts.append(row.prompt)  # the step that trains says what its template has against it
    prompts = counter.counts(texts)
    longest = np.zeros(len(rows), np.int64)
    answered = [i for i, row in enumerate(rows) if row.trained for _ in row.answers]
    if answered:
        answers = counter.counts([answer for row in rows if row.trained for answer in row.answers])
        np.maximum.at(longest, answered, answers + 1)
    total: np.ndarray = (prompts + longest).astype(np.uint32)
    return total


def _line(data: dict[str, Any]) -> bytes:
    try:
        return sources.dumps(data) + b"\n"
    except (ValueError, TypeError) as error:
        raise BadRow(f"cannot be written as JSON ({error})") from None


def _quarantined(raw: Raw, reason: str) -> bytes:
    text = raw.text.decode("utf-8", "replace").rstrip("\n") if raw.text else json.dumps(raw.data, default=str)
    shown = text if len(text) <= _BAD_SHOWN else f"{text[:_BAD_SHOWN]}…"
    return json.dumps({"line": raw.line, "reason": reason, "row": shown}, ensure_ascii=True).encode() + b"\n"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def read_array(path: Path, dtype: np.dtype, first: int = 0, count: int = -1) -> np.ndarray:
    """Entries of one of a part's files."""
    return np.fromfile(path, dtype, count, offset=first * dtype.itemsize)


def marks(folder: Path, units: Sequence[Unit]) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Every unit's mark, in order."""
    for unit in units:
        yield unit, json.loads((folder / f"{name_of(unit)}.json").read_bytes())
