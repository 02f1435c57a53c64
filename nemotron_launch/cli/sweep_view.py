"""How a compiled sweep looks: its points, and the array job or the scripts that they become."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from nemotron_launch.cli import job_view
from nemotron_launch.compiler import Compiled, as_data, write_to
from nemotron_launch.frozen import replace
from nemotron_launch.job import Job
from nemotron_launch.render import render
from nemotron_launch.resources import display
from nemotron_launch.sweeps import PACKED, Sweep, pack

_SHOWN = 40  # points in a table on a terminal, all of them elsewhere


def show(sweep: Sweep, output: str | None) -> None:
    """Print a dry run of a sweep, as `--output` asks for it; warnings go to stderr."""
    if output is None and sys.stdout.isatty():
        _print_terminal(sweep)
        return
    for warning in sweep.warnings:
        click.echo(f"warning: {warning}", err=True)
    if output in ("json", "yaml"):
        data = _as_data(sweep)
        if output == "json":
            click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            from nemotron_launch.config.yaml_files import dump

            job_view.print_bytes(dump(data))
    elif output in (None, "script"):
        job_view.print_bytes(_script(sweep) if output else _script(sweep) + _comments(sweep))
    else:
        assert output is not None
        _write(sweep, Path(output.removeprefix("dir=")).expanduser())


def point_line(sweep: Sweep, n: int) -> str:
    """One point: what it sets and where its output goes."""
    return f"{' '.join(sweep.points[n])} → {sweep.jobs[n].output_dir}"


def _compiled(sweep: Sweep, job: Job) -> Compiled:
    rendered = sweep.rendered or render(job)
    return Compiled(sweep.step, sweep.composed[0], sweep.profile, job, rendered, sweep.warnings)


def _script(sweep: Sweep) -> str:
    """What is submitted: the array's script, or on this machine each point's, one below the other."""
    if sweep.rendered:
        return sweep.rendered.text
    return "".join(f"# Point {n}: {point_line(sweep, n)}\n{render(job).text}\n" for n, job in enumerate(sweep.jobs))


def _comments(sweep: Sweep) -> str:
    """The points as comments behind the script."""
    if not sweep.rendered:
        return ""  # each stands above its own
    lines = [f"# {len(sweep.points)} points:", *(f"#   {n}: {point_line(sweep, n)}" for n in range(len(sweep.points)))]
    return "\n" + "".join(f"{line}\n" for text in lines for line in text.replace("\n", "\n# ").split("\n"))


def _as_data(sweep: Sweep) -> dict[str, Any]:
    points = [
        {"point": n, "overrides": list(overrides), "output_dir": sweep.jobs[n].output_dir, "config": one.data}
        for n, (overrides, one) in enumerate(zip(sweep.points, sweep.composed, strict=True))
    ]
    head = {"run_id": sweep.run_id, "max_parallel": sweep.max_parallel, "points": points}
    if not sweep.array:
        return {**head, "jobs": [as_data(_compiled(sweep, job)) for job in sweep.jobs]}
    return {**head, **as_data(_compiled(sweep, replace(sweep.array, points=())))}


def _write(sweep: Sweep, folder: Path) -> None:
    if sweep.array is None:
        written = sum(len(write_to(_compiled(sweep, job), folder / f"point-{n}")) for n, job in enumerate(sweep.jobs))
        click.echo(f"wrote {written} files to {display(folder)}; of each point:  bash point-<number>/run.sh", err=True)
        return
    compiled = _compiled(sweep, sweep.array)
    written = len(write_to(compiled, folder)) + 1
    packed = folder / PACKED
    packed.touch(mode=0o600)
    packed.write_bytes(pack(sweep.array))
    click.echo(f"wrote {written} files to {display(folder)}", err=True)
    job_view.print_by_hand(sweep.array, compiled.rendered.main)


def _print_terminal(sweep: Sweep) -> None:
    compiled = _compiled(sweep, sweep.array or sweep.jobs[0])
    config = f"{sweep.step.id} -c {sweep.jobs[0].config}" + "".join(f" {one}" for one in sweep.overrides)
    at_once = f", at most {sweep.max_parallel} at a time" if sweep.max_parallel else ""
    if sweep.array is None and not sweep.max_parallel:
        at_once = ", one after another"
    facts = []
    for name, value in job_view.facts_of(compiled):
        if name == "step":
            facts += [(name, config), ("points", f"{len(sweep.points)}{at_once}")]
        elif name != "output":  # the first point's
            facts.append((name, value))
    job_view.print_summary(facts, sweep.warnings)
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("POINT", "OVERRIDES", "OUTPUT"):
        table.add_column(head, header_style="bold", overflow="fold")
    for n in range(min(len(sweep.points), _SHOWN)):
        table.add_row(str(n), " ".join(sweep.points[n]), sweep.jobs[n].output_dir)
    console = Console(highlight=False, markup=False)
    console.print(table)
    if len(sweep.points) > _SHOWN:
        console.print(f"… and {len(sweep.points) - _SHOWN} more: --output json shows all")
    job_view.print_files(compiled)
