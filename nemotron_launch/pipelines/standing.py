"""How a pipeline's stages stand: done, at work or still to run, by the records beside their results and the ledger.

A stage is done when the record in its folder says so: of a run of the same config, with the inputs that are there now.
"""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from nemotron_launch.artifacts.content import content_of
from nemotron_launch.artifacts.record import FILE, Record, parse
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.hosts import Host
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import LIVE, Run
from nemotron_launch.jobs.settle import Backends, Warn
from nemotron_launch.jobs.status import refresh
from nemotron_launch.jobs.submission import new_run
from nemotron_launch.pipelines.compile import Planned
from nemotron_launch.pipelines.file import Pipeline

# Moves a folder to the first free name beside it, and says which; nothing where there is none.
_ASIDE = (
    'f={folder}; [ -e "$f" ] || exit 0; n=1; while [ -e "$f.$n" ]; do n=$((n + 1)); done; mv "$f" "$f.$n" && echo $n'
)


@frozen
class Standing:
    """How a stage stands. row: what the ledger would get if it ran now; run: the newest that ran in its folder.

    why: of one that is to run, the reason to do so again; "" where it has not run yet. stale: what lies in its folder
    is of another config or other inputs, and no place to go on. at: when it was done, seconds since 1970.
    """

    planned: Planned
    row: Run
    state: Literal["done", "live", "to do"]
    run: Run | None = None
    why: str = ""
    stale: bool = False
    record: Record | None = None
    at: float = 0.0

    @property
    def name(self) -> str:
        return self.planned.name


def standings(
    pipeline: Pipeline,
    planned: Sequence[Planned],
    ledger: Ledger,
    backends: Backends,
    warn: Warn,
    *,
    again: Collection[str] = (),
    asked: bool = False,
) -> dict[str, Standing]:
    """How every stage stands, in their order. again: stages that are to run although they are done. asked: only that.

    UserError, unless it is only asked: a stage is at work and should not be.
    """
    rows = {one.name: row_of(pipeline, one) for one in planned}
    newest = _newest(ledger, list(rows.values()))
    known = refresh(ledger, backends, list(newest.values()), warn)
    now = dict(zip(newest, [one.run for one in known], strict=True))
    found: dict[str, Standing] = {}
    for one in planned:
        row = rows[one.name]
        found[one.name] = _stands(one, row, now.get(_place(row)), backends, found, one.name in again, asked)
    return found


def row_of(pipeline: Pipeline, planned: Planned) -> Run:
    """The row of the ledger for a stage."""
    run = new_run(planned.compiled.job, planned.compiled.composed.overrides)
    return replace(run, pipeline=os.path.abspath(pipeline.file), stage=planned.name)


def set_aside(one: Standing, backends: Backends) -> str:
    """Move what an earlier run left out of a stage's folder; where to, "" where there was nothing."""
    host = backends.of(one.row).host
    if host is None:
        hint = "choose another output_dir for the pipeline"
        raise UserError(f"stage {one.name}: {one.row.output_dir} cannot be emptied from here", hint=hint)
    done = host.run(_ASIDE.format(folder=shlex.quote(one.row.output_dir)))
    if done.code:
        raise UserError(f"cannot be moved aside: {done.stderr.strip()}", where=one.row.output_dir, exit_code=1)
    number = done.stdout.strip()
    return f"{one.planned.compiled.job.output_dir}.{number}" if number else ""


def _newest(ledger: Ledger, rows: Sequence[Run]) -> dict[tuple[str, str], Run]:
    """The newest run in the folder of each row."""
    wanted = {_place(row) for row in rows}
    found: dict[tuple[str, str], Run] = {}
    for run in ledger.runs(where=lambda run: not run.sweep and _place(run) in wanted):
        found.setdefault(_place(run), run)
    return found


def _place(run: Run) -> tuple[str, str]:
    """Where a run's results lie: the file system and the folder."""
    files = run.host if run.executor == "lepton" or run.contact.get("type") == "ssh" else ""
    return files, posixpath.normpath(run.output_dir)


def _stands(
    one: Planned,
    row: Run,
    run: Run | None,
    backends: Backends,
    others: Mapping[str, Standing],
    again: bool,
    asked: bool,
) -> Standing:
    needs = [others[name] for name in one.stage.needs]
    to_run = [need.name for need in needs if need.state == "to do"]
    same = run is not None and run.config_sha256 == row.config_sha256
    if run is not None and run.state in LIVE:
        why = "with another config" if not same else f"while {to_run[0]} is still to run" if to_run else ""
        if asked:
            return Standing(one, row, "live", run, why)
        if why or again:
            hint = f"wait for it, or end it:  nemotron jobs cancel {run.run_id}"
            raise UserError(f"stage {one.name} is {run.state} {why}".rstrip() + f": {run.run_id}", hint=hint)
        return Standing(one, row, "live", run)
    host = backends.of(row).host
    record = _record(host, row)
    seen = Standing(one, row, "to do", run, record=record)
    why = "asked for" if again else f"{to_run[0]} runs before it" if to_run else ""
    if not why and any(need.state == "live" for need in needs):
        why = "what it takes is being made"
    if why:  # a reason to do it again only where something has been done
        return replace(seen, why=why, stale=True) if run is not None or record is not None else seen
    if record is not None:
        why = _changed(one, row, record, host, others)
        if why:
            return replace(seen, why=why, stale=True)
        return replace(seen, state="done", at=record.created)
    if run is None:
        return seen
    # Nothing is recorded: the run did not come to its end, or its step records nothing.
    since = max([need.at for need in needs], default=0.0)
    old = (run.ended or run.created) < since
    if not same or old:
        return replace(seen, why="its config has changed" if not same else "what it takes is newer", stale=True)
    if run.state == "finished":
        if host is None or host.entries(row.output_dir) is not None:
            return replace(seen, state="done", at=run.ended or run.created)
        return replace(seen, why="what it made is gone", stale=True)
    code = f", exit code {run.exit_code}" if run.exit_code else ""
    return replace(seen, why=f"failed{code}" if run.state == "failed" else f"was {run.state}{code}")


def _record(host: Host | None, row: Run) -> Record | None:
    if host is None:
        return None
    path = posixpath.join(row.output_dir, FILE)
    data = host.read({path: 0}, limit=1 << 24).get(path)
    return parse(data, row.output_dir) if data is not None else None


def _changed(one: Planned, row: Run, record: Record, host: Host | None, others: Mapping[str, Standing]) -> str:
    """Why what a record tells of is not what the stage would make now; "" where it is."""
    if record.config_sha256 != row.config_sha256:
        return "its config has changed"
    for key, source in one.binds.items():
        made = others[source.stage].record
        used = next((used for used in record.inputs if used.key == key), None)
        if made and (used is None or used.record not in ("", made.digest)):
            return f"what {source.stage} made has changed"
    own = [used for used in record.inputs if used.key not in one.binds and used.content]
    for used in own if one.place.files == "this machine" else []:
        if os.path.exists(used.path) and content_of(Path(used.path)) != used.content:
            return f"{used.path} has changed"
    places = " ".join(f"-e {shlex.quote(made.place)} -a" for made in record.artifacts)
    if host is not None and places and host.run(f"[ {places.removesuffix(' -a')} ]").code:
        return "what it made is gone"
    return ""
