"""How a pipeline looks: its jobs before anything runs, what happens while it runs, and how its stages are."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nemotron_launch.cli import job_view
from nemotron_launch.cli.job_tables import plain
from nemotron_launch.cli.tables import print_table
from nemotron_launch.compiler import as_data as job_data
from nemotron_launch.compiler import write_to
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.pipelines.compile import Planned
from nemotron_launch.pipelines.file import Pipeline
from nemotron_launch.pipelines.standing import Standing
from nemotron_launch.resources import display

# A dry run --------------------------------------------------------------------------------------------------------


def show(pipeline: Pipeline, planned: Sequence[Planned], output: str | None) -> None:
    """Print the jobs of a dry run, as `--output` asks for them; warnings go to stderr."""
    if output is None and sys.stdout.isatty():
        for n, one in enumerate(planned):
            click.secho(f"{chr(10) * bool(n)}{_head(one, n, len(planned))}", bold=True)
            job_view.print_summary(job_view.facts_of(one.compiled), one.compiled.warnings)
            job_view.print_files(one.compiled)
        return
    for one in planned:
        for warning in one.compiled.warnings:
            click.echo(f"warning: stage {one.name}: {warning}", err=True)
    if output in (None, "script"):
        for n, one in enumerate(planned):
            head = f"# {_head(one, n, len(planned))}\n" if len(planned) > 1 else ""
            job_view.print_bytes(head + one.compiled.rendered.text)
    elif output in ("json", "yaml"):
        stages = [{"stage": one.name, "after": list(one.stage.needs), **job_data(one.compiled)} for one in planned]
        data = {"pipeline": pipeline.name, "output_dir": pipeline.output_dir, "stages": stages}
        if output == "json":
            click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            from nemotron_launch.config.yaml_files import dump

            job_view.print_bytes(dump(data))
    else:
        assert output is not None
        folder = Path(output.removeprefix("dir=")).expanduser()
        written = sum(len(write_to(one.compiled, folder / one.name)) for one in planned)
        click.echo(f"wrote {written} files to {display(folder)}, a folder for each stage", err=True)


def _head(one: Planned, n: int, count: int) -> str:
    needs = f", after {', '.join(one.stage.needs)}" if one.stage.needs else ""
    return f"stage {n + 1} of {count}, {one.name}: {one.label}{needs}"


# While it runs ----------------------------------------------------------------------------------------------------


class Terminal:
    """Prints what running tells, and follows jobs. See pipelines.run.Watcher."""

    def __init__(
        self, ledger: Ledger, backends: Backends, *, attached: bool, on_interrupt: str | None, as_json: bool
    ) -> None:
        self.ledger, self.backends = ledger, backends
        self.attached, self.on_interrupt, self.as_json = attached, on_interrupt, as_json
        self.jobs: list[dict[str, Any]] = []

    def say(self, line: str) -> None:
        sys.stdout.flush()
        click.echo(f"nemotron: {line}", err=True)

    def submitted(self, stage: str, run: Run) -> None:
        from nemotron_launch.cli import submit

        self.jobs.append({"stage": stage, **submit.as_data([run]), "after": list(run.after)})
        if not self.as_json:
            submit.say_submitted([run], self.attached)

    def follow(self, run: Run) -> int:
        from nemotron_launch.cli.following import follow_to_end

        return follow_to_end(self.ledger, self.backends, [run], on_interrupt=self.on_interrupt)

    def close(self) -> None:
        """Print what waits for the end."""
        if self.as_json:
            click.echo(json.dumps(self.jobs, indent=2))


# How it is --------------------------------------------------------------------------------------------------------


def print_standings(found: Sequence[Standing]) -> None:
    rows = [
        (
            one.name,
            one.planned.label,
            _state(one),
            one.run.run_id if one.run else "-",
            one.planned.compiled.job.output_dir,
        )
        for one in found
    ]
    print_table(("STAGE", "STEP", "STATE", "RUN", "OUTPUT"), [tuple(map(plain, row)) for row in rows], whole=1)


def _state(one: Standing) -> str:
    if one.state == "done":
        return "done"
    if one.state == "live":
        assert one.run is not None
        return one.run.state + (f": {one.why}" if one.why else "")
    return "to do" + (f": {one.why}" if one.why else "")


def as_data(one: Standing) -> dict[str, Any]:
    """A stage as `pipeline status --json` prints it."""
    run, compiled = one.run, one.planned.compiled
    return {
        "stage": one.name,
        "step": compiled.step.id,
        "config": compiled.composed.name,
        "profile": compiled.job.profile,
        "state": one.state if one.state != "live" or run is None else run.state,
        "why": one.why,
        "run_id": run.run_id if run else None,
        "run_state": run.state if run else None,
        "exit_code": run.exit_code if run else None,
        "output_dir": one.row.output_dir,
        "after": list(one.planned.stage.needs),
        "outputs": {
            port.key: compiled.composed.get(port.key)
            for port in compiled.step.produces
            if compiled.composed.get(port.key)
        },
    }
