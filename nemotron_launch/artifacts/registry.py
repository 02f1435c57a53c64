"""The artifacts that the ledger knows: what finished runs made, under a name and a version, from their records.

A run's record is read through its host once the run is known to have finished, many in one call. Which runs of which
machine that concerns, `register_finished` finds out; it is cheap where there is nothing to do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_launch.artifacts import identity
from nemotron_launch.artifacts.record import FILE, Made, Record, Used, as_bytes, parse
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen
from nemotron_launch.hosts import Host
from nemotron_launch.jobs.ledger import LAST, Ledger
from nemotron_launch.jobs.run import Run

if TYPE_CHECKING:
    from nemotron_launch.jobs.settle import Backends, Warn

_AT_ONCE = 200  # records that one call reads
_LARGEST = 4 << 20  # bytes of a record
_GRACE = (
    120.0  # seconds in which the record of a run that has just finished may still be on its way through a file system
)
_LATEST = "latest"


class NothingMade(UserError):
    """The run has made no artifact."""

    def __init__(self, run_id: str, why: str) -> None:
        super().__init__(f"{run_id} {why}", hint=f"nemotron jobs status {run_id}")
        self.run_id = run_id


@frozen
class Entry:
    """Artifacts of one run under their name. version: 1, 2, … in order of registration.

    config: its name. executor, host, contact: where they lie, as in Run. uses: artifacts that the run's config named
    (`job.Use` as data). code: what the run was submitted with.
    """

    name: str
    version: int
    run_id: str
    step: str
    config: str
    record: Record
    executor: str = "local"
    host: str = ""
    contact: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[Mapping[str, Any], ...] = ()
    code: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(made.type for made in self.record.artifacts)


# Reading -----------------------------------------------------------------------------------------------------------


def entries(ledger: Ledger, *, name: str | None = None) -> list[Entry]:
    """All artifacts, or the versions of one name; the newest first."""
    where, values = ("WHERE name = ?", [name]) if name is not None else ("", [])
    query = f"SELECT name, version, run_id, data FROM artifacts {where} ORDER BY created DESC, name, version DESC"
    return [_read(*row) for row in ledger.query(query, values)]


def entry(ledger: Ledger, name: str, version: int) -> Entry | None:
    """One version of a name."""
    query = "SELECT name, version, run_id, data FROM artifacts WHERE name = ? AND version = ?"
    return next((_read(*row) for row in ledger.query(query, [name, version])), None)


def of_run(ledger: Ledger, run_id: str) -> Entry | None:
    """What a run made; None where it left nothing, has not finished, or nobody has looked since (register_finished).

    Runs that found that they had finished already share the entry of the run that did the work.
    """
    query = (
        "SELECT a.name, a.version, a.run_id, a.data FROM registered r JOIN artifacts a "
        "ON a.name = r.name AND a.version = r.version WHERE r.run_id = ?"
    )
    return next((_read(*row) for row in ledger.query(query, [run_id])), None)


def labels(ledger: Ledger) -> dict[str, str]:
    """Of each run that has made something, NAME@VERSION."""
    rows = ledger.query("SELECT run_id, name, version FROM registered WHERE name != ''")
    return {run_id: f"{name}@{version}" for run_id, name, version in rows}


def find(ledger: Ledger, text: str) -> Entry:
    """The entry that NAME@VERSION, NAME@latest or NAME (its latest) means. UserError: there is none."""
    name, at, version = text.partition("@")
    if at and version != _LATEST and not version.isdecimal():
        hint = f"{name}@1, or {name}@{_LATEST} for the newest"
        raise UserError(f"a version of {name} is a number, not {version!r}", hint=hint)
    versions = entries(ledger, name=name)
    if not versions:
        near = _near(name, _names(ledger))
        hint = f"did you mean {near}?" if near else "nemotron artifacts list shows them"
        raise UserError(f"there is no artifact {name}", hint=hint)
    if not at or version == _LATEST:
        return max(versions, key=lambda one: one.version)
    for one in versions:
        if one.version == int(version):
            return one
    known = ", ".join(str(one.version) for one in sorted(versions, key=lambda one: one.version)[-10:])
    raise UserError(f"{name} has no version {version}", hint=f"there are: {known}")


def find_any(ledger: Ledger, text: str) -> Entry:
    """The entry that a person means: NAME@VERSION, NAME, or a run's id, the unique start of one, or `last`.

    UserError: there is none. NothingMade: the run has made none.
    """
    if "@" in text or ledger.query("SELECT 1 FROM artifacts WHERE name = ? LIMIT 1", [text]):
        return find(ledger, text)
    if by_run := ledger.query("SELECT name, version FROM artifacts WHERE run_id = ?", [text]):
        return find(ledger, "@".join(map(str, by_run[0])))
    run = run_named(ledger, text)
    if found := of_run(ledger, run.run_id):
        return found
    why = "left no record of what it made" if run.state == "finished" else f"is {run.state}: it has made nothing yet"
    raise NothingMade(run.run_id, why)


def run_named(ledger: Ledger, text: str) -> Run:
    """The run of a name that no artifact has. UserError: none has it, or a sweep of several points."""
    if not ledger.names(text) and text != LAST:
        near = _near(text, [*_names(ledger), *ledger.names()])
        hint = f"did you mean {near}?" if near else "nemotron artifacts list, and nemotron jobs list, show them"
        raise UserError(f"there is no artifact and no run {text!r}", hint=hint)
    runs = ledger.find(text)
    if len(runs) > 1:
        hint = f"a point of it is, for example, {runs[0].run_id}"
        raise UserError(f"{runs[0].sweep} is a sweep of {len(runs)} points", hint=hint)
    return runs[0]


def _names(ledger: Ledger) -> list[str]:
    return [row[0] for row in ledger.query("SELECT DISTINCT name FROM artifacts ORDER BY name")]


def _near(text: str, names: Sequence[str]) -> str | None:
    """The name that is nearest to a text, or begins with it."""
    beginning = [name for name in names if text and name.startswith(text)]
    return next(iter([*get_close_matches(text, names, n=1), *beginning]), None)


def as_data(one: Entry) -> dict[str, Any]:
    """All of an entry, for `--json`."""
    return {
        "artifacts": [
            {**vars(made), "tokens": vars(made.tokens) if made.tokens else None, "place": made.place}
            for made in one.record.artifacts
        ],
        "inputs": [dict(vars(used)) for used in one.record.inputs],
        "uses": [dict(use) for use in one.uses],
        "config_sha256": one.record.config_sha256,
        "code": {**one.record.code, **one.code},
        "metrics": dict(one.record.metrics),
        "digest": one.record.digest,
        "folder": one.record.folder,
    }


# Registering -------------------------------------------------------------------------------------------------------


def register_finished(ledger: Ledger, backends: Backends, warn: Warn, runs: Iterable[Run] | None = None) -> None:
    """Register what runs that have finished made, where that has not been done. runs: only of these.

    A host that is out of reach is a warning: the next command tries again.
    """
    left = {row[0] for row in ledger.query(_LEFT)}
    if runs is None:
        runs = [run for run_id in left if (run := ledger.get(run_id))] if left else []
    for group in backends.groups(run for run in runs if run.run_id in left):
        try:
            register(ledger, backends.of(group[0]).host, group, warn)
        except UserError as error:
            what = group[0].run_id if len(group) == 1 else f"{len(group)} runs"
            warn(f"{error.message}: what {what} made is not registered yet")


_LEFT = "SELECT run_id FROM runs WHERE state = 'finished' AND run_id NOT IN (SELECT run_id FROM registered)"


def register(ledger: Ledger, host: Host | None, runs: Sequence[Run], warn: Warn | None = None) -> None:
    """Read the records of finished runs of one host, and enter them. host: None where no folder can be read.

    Of those only what their jobs say is known. A record that cannot be understood is a warning, once; without `warn`
    such a run waits for a call with it. UserError: the host cannot be reached.
    """
    found: list[tuple[Run, Record | None]] = []
    runs = [run for run in runs if run.executor != "local" or run.host in ("", os.uname().nodename)]  # others': theirs
    for start in range(0, len(runs), _AT_ONCE):
        part = runs[start : start + _AT_ONCE]
        if host is None:
            found += [(run, _from_job(ledger, run)) for run in part]
            continue
        files = {run.run_id: os.path.join(run.output_dir, FILE) for run in part}
        texts = host.read(dict.fromkeys(files.values(), 0), limit=_LARGEST)
        for run in part:
            data = texts.get(files[run.run_id])
            if data is None and time.time() - (run.ended or 0) < _GRACE:
                continue
            try:
                found.append((run, parse(data, run.output_dir) if data is not None else None))
            except UserError as error:
                if warn is not None:
                    warn(f"{error.where}: {error.message}: what {run.run_id} made is not known")
                    found.append((run, None))
    _enter(ledger, [(run, record if record and not _of_another(run, record) else None) for run, record in found])


def _of_another(run: Run, record: Record) -> bool:
    """Whether a later run has left its record in the same folder."""
    other = record.config_sha256 != run.config_sha256
    return other and run.ended is not None and record.created > run.ended + 60


def _enter(ledger: Ledger, found: Sequence[tuple[Run, Record | None]]) -> None:
    """Give each record a version, in the order in which the runs ended; a record that is known keeps the one it has."""
    with ledger.transaction() as execute:
        for run, record in sorted(found, key=lambda pair: (pair[0].ended or pair[0].created, pair[0].run_id)):
            if execute("SELECT 1 FROM registered WHERE run_id = ?", (run.run_id,)).fetchone():
                continue
            name, version = "", 0
            if record and record.artifacts:
                name = run.artifact or _name_of(run)
                known = execute("SELECT name, version FROM artifacts WHERE digest = ?", (record.digest,)).fetchone()
                if known:
                    name, version = known
                else:
                    last = execute("SELECT max(version) FROM artifacts WHERE name = ?", (name,)).fetchone()[0]
                    version = (last or 0) + 1
                    execute(
                        "INSERT INTO artifacts (name, version, run_id, step, digest, created, data) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (name, version, run.run_id, run.step, record.digest, record.created, _written(run, record)),
                    )
            execute("INSERT INTO registered (run_id, name, version) VALUES (?, ?, ?)", (run.run_id, name, version))


def _name_of(run: Run) -> str:
    """The name for a run that was submitted before its job said one."""
    return f"{run.step.rpartition('/')[2]}-{run.config}"


def _from_job(ledger: Ledger, run: Run) -> Record | None:
    """A record of what can be known without the run's folder: the paths that its config names.

    The config is the one that was submitted, from the files that are kept beside the ledger.
    """
    from nemotron_launch.catalog import find_step
    from nemotron_launch.config.yaml_files import load_plain
    from nemotron_launch.jobs.submission import kept_folder

    folder = kept_folder(ledger.folder, run.sweep or run.run_id)
    path = (folder / f"point-{run.point}" if run.sweep else folder) / "config.yaml"
    try:
        step, config = find_step(run.step), load_plain(path)
    except UserError:
        return None
    tokens = identity.of_config(config, step.folder, cwd=Path(run.workdir))

    def value(key: str) -> Any:
        at: Any = config
        for segment in key.split("."):
            at = at.get(segment) if isinstance(at, dict) else None
        return at

    def absolute(text: str) -> str:
        return os.path.normpath(os.path.join(run.workdir, text))

    made = [
        Made(port.type, port.key, absolute(given), tokens=tokens)
        for port in step.produces
        if isinstance(given := value(port.key), str)
    ]
    used = [
        Used(port.type, port.key, given, "" if given.startswith("step://") else absolute(given))
        for port in step.consumes
        if isinstance(given := value(port.key), str)
    ]
    ended = run.ended or time.time()
    record = Record(run.step, run.config_sha256, ended, tuple(made), tuple(used), folder=run.output_dir)
    return parse(as_bytes(record), run.output_dir)


# Rows --------------------------------------------------------------------------------------------------------------


def _written(run: Run, record: Record) -> str:
    facts = {
        "step": run.step, "config": run.config, "executor": run.executor, "host": run.host,
        "contact": dict(run.contact), "uses": [dict(use) for use in run.uses], "code": dict(run.code),
    }  # fmt: skip
    text = as_bytes(record).decode("utf-8", "surrogateescape")
    return json.dumps({**facts, "folder": record.folder, "digest": record.digest, "record": text})


def _read(name: str, version: int, run_id: str, data: str) -> Entry:
    values = json.loads(data)
    folder, digest = values.pop("folder"), values.pop("digest")
    record = parse(values.pop("record").encode("utf-8", "surrogateescape"), folder, digest=digest)
    known = {key: value for key, value in values.items() if key in Entry.__dict__["__dataclass_fields__"]}
    known["uses"] = tuple(known.get("uses", ()))
    return Entry(name=name, version=version, run_id=run_id, record=record, **known)
