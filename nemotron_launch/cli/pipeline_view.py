"""How a compiled pipeline looks: every job, as it would be submitted."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nemotron_launch.cli import job_view
from nemotron_launch.compiler import as_data as job_data
from nemotron_launch.compiler import write_to
from nemotron_launch.pipelines.compile import Planned
from nemotron_launch.pipelines.file import Pipeline
from nemotron_launch.resources import display


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
