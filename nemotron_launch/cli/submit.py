"""What `steps run -r|-b` does once it knows what to run: compile, submit, say so; with -r follow to the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotron_launch.catalog import Step
from nemotron_launch.cli.jobs import warn
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.hosts import Upload
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends, settle
from nemotron_launch.jobs.status import refresh
from nemotron_launch.jobs.submission import new_run, submit_behind, uploads

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile


@frozen
class Asked:
    """How a run is submitted. attached: -r, not -b. after: names of runs that must finish first.

    force_squash: its image is imported anew.
    """

    attached: bool
    after: tuple[str, ...] = ()
    on_interrupt: str | None = None
    as_json: bool = False
    force_squash: bool = False


def submit_run(
    step: Step,
    config: Path,
    overrides: Sequence[str],
    passthrough: Sequence[str],
    profile: Profile,
    asked: Asked,
    *,
    run_id: str | None = None,
) -> int:
    """Submit a step to where the profile says; the exit code of the command, attached that of the run."""
    if asked.after and profile.executor == "lepton":
        hint = f"nemotron jobs wait {asked.after[0]} waits for it here"
        raise UserError("Lepton's jobs cannot wait for another one", where="--after", hint=hint)
    if profile.executor == "local":
        planned = _staged(step, config, overrides, passthrough, profile, run_id)
    else:
        planned = [_compiled(step, config, overrides, passthrough, profile, run_id, asked.attached)]
    return submit_all([(run, files, []) for run, files in planned], asked)


def submit_all(planned: Sequence[tuple[Run, Sequence[Upload], Sequence[Run]]], asked: Asked) -> int:
    """Submit runs, each after the one before it, and follow the last one if that was asked for; the exit code.

    planned: of each run its row, its files and, of a sweep, the rows of its points.
    """
    with Ledger() as ledger, Backends() as backends:
        settle(ledger, backends, warn)
        named = [run for name in asked.after for run in ledger.find(name)]
        before = [known.run for known in refresh(ledger, backends, named, warn)]
        rows: list[Run] = []
        for run, files, points in planned:
            options = {**run.options, "force_squash": True} if asked.force_squash else run.options
            run = replace(run, options=options)
            points = [replace(point, options=options) for point in points]
            before = rows = submit_behind(ledger, backends, run, files, before, warn, points=points)
            if not asked.as_json:
                say_submitted(rows, asked.attached)
        if asked.as_json:
            click.echo(json.dumps(as_data(rows), indent=2))
        if not asked.attached:
            return 0
        from nemotron_launch.cli.following import follow_to_end

        return follow_to_end(ledger, backends, rows, on_interrupt=asked.on_interrupt)


def _compiled(
    step: Step,
    config: Path,
    overrides: Sequence[str],
    passthrough: Sequence[str],
    profile: Profile,
    run_id: str | None,
    attached: bool,
) -> tuple[Run, list[Upload]]:
    from nemotron_launch.compiler import compile_job
    from nemotron_launch.plan import compose_for, new_run_id

    if run_id is None:
        run_id = new_run_id(step, compose_for(step, config, overrides, profile))
    compiled = compile_job(step, config, overrides, profile, passthrough, run_id=run_id, attached=attached)
    for warning in compiled.warnings:
        warn(warning)
    return new_run(compiled.job, overrides), uploads(compiled.job, compiled.rendered)


def _staged(
    step: Step,
    config: Path,
    overrides: Sequence[str],
    passthrough: Sequence[str],
    profile: Profile,
    run_id: str | None,
) -> list[tuple[Run, list[Upload]]]:
    """On this machine: a run for each step that makes what is missing, then the step itself, one after another."""
    from nemotron_launch.backends.local import check_machine
    from nemotron_launch.inputs import stages
    from nemotron_launch.plan import compose_for
    from nemotron_launch.render import render

    planned = stages(step, compose_for(step, config, overrides, profile), profile, passthrough, run_id=run_id)
    for stage in planned:
        check_machine(stage.job)
    found = []
    for stage in planned:
        if stage.why:
            click.echo(f"nemotron: {stage.why}", err=True)
        files = uploads(stage.job, render(stage.job))
        found.append((new_run(stage.job, () if stage.why else overrides), files))
    return found


def say_submitted(rows: Sequence[Run], attached: bool) -> None:
    """Run id, job id, folder, and the commands that come next. On stderr when the log follows."""
    run, whole = rows[0], len(rows) > 1
    name = run.sweep if whole else run.run_id
    job = run.job_id.partition("_")[0] if whole else run.job_id
    what = f"{len(rows)} points" if whole else " ".join(run.overrides if run.sweep else [run.step, "-c", run.config])
    where = {"local": "in the background here, process", "lepton": f"in Lepton's workspace {run.host}, job"}
    place = where.get(run.executor, f"on {run.host or 'this cluster'}, job")
    lines = [f"{click.style(name, bold=True)}: {what}, {place} {job}", f"  folder  {run.run_dir}"]
    if run.reason:
        lines.append(f"  note    {run.reason}")
    if not attached:
        lines += [f"  log     nemotron jobs logs {name} -f", f"  state   nemotron jobs status {name}"]
        lines += [f"  end it  nemotron jobs cancel {name}"]
    click.echo("\n".join(lines), err=attached)


def as_data(rows: Sequence[Run]) -> Any:
    """What `--json` prints of runs that were just submitted."""
    data = [
        {"run_id": run.run_id, "job_id": run.job_id, "state": run.state, "run_dir": run.run_dir, "host": run.host}
        for run in rows
    ]
    return data if rows[0].sweep else data[0]
