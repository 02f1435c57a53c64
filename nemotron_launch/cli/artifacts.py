"""`nemotron artifacts list|show|lineage`, and `nemotron steps graph`: what runs made, of what, and for which steps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nemotron_launch.cli.main import LazyGroup

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nemotron_launch.artifacts.registry import Entry
    from nemotron_launch.jobs.ledger import Ledger

artifacts = LazyGroup(
    "artifacts",
    help="List and show what runs made, and of what. A config names it in place of a path: artifact:NAME@VERSION, "
    "run:RUN or run:last:STEP.",
    no_args_is_help=True,
    lazy={
        "list": ("nemotron_launch.cli.artifacts:list_artifacts", "List what runs made, the newest first."),
        "show": ("nemotron_launch.cli.artifacts:show", "Show all that is known of what a run made."),
        "lineage": (
            "nemotron_launch.cli.artifacts:lineage",
            "Show of what a run's artifacts were made, and what uses them.",
        ),
    },
)


def complete_artifact(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names with their versions, then runs. Silent where the ledger is broken."""
    from click.shell_completion import CompletionItem

    from nemotron_launch.artifacts import registry
    from nemotron_launch.cli.jobs import complete_run
    from nemotron_launch.errors import UserError
    from nemotron_launch.jobs.ledger import Ledger

    try:
        with Ledger() as ledger:
            labels = [one.label for one in registry.entries(ledger) if one.label.startswith(incomplete)]
    except UserError:
        return []
    return [*(CompletionItem(label) for label in labels[:100]), *complete_run(ctx, param, incomplete)]


NAME = click.argument("name", metavar="NAME[@VERSION]|RUN", shell_complete=complete_artifact)


@contextmanager
def opened() -> Iterator[Ledger]:
    """The ledger, with what finished runs made registered."""
    from nemotron_launch.artifacts.registry import register_finished
    from nemotron_launch.cli import jobs
    from nemotron_launch.jobs.run import LIVE
    from nemotron_launch.jobs.status import refresh

    with jobs.opened() as (ledger, backends):
        if live := ledger.runs(states=LIVE):
            refresh(ledger, backends, live, jobs.warn)
        register_finished(ledger, backends, jobs.warn)
        yield ledger


@click.command("list")
@click.option("--type", "type_name", metavar="TYPE", help="Only artifacts that can serve as this type.")
@click.option("--step", metavar="ID", help="Only what this step made.")
@click.option("-n", "--limit", type=click.IntRange(1), default=30, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_artifacts(type_name: str | None, step: str | None, limit: int, as_json: bool) -> None:
    """List what runs made, the newest first."""
    from nemotron_launch.artifacts import registry
    from nemotron_launch.catalog import find_step, is_a, known_type, load_artifacts

    types = load_artifacts()
    if type_name is not None:
        known_type(type_name, types)
    step_id = find_step(step).id if step is not None else None
    with opened() as ledger:
        found = registry.entries(ledger)
    rows = [
        (one, made)
        for one in found
        for made in one.record.artifacts
        if (step_id is None or one.step == step_id) and (type_name is None or is_a(types, made.type, type_name))
    ]
    if as_json:
        _print_json([{**_facts(one), "type": made.type, "path": made.place} for one, made in rows[:limit]])
        return
    if not rows:
        click.echo("no artifact matches" if found else "no run has made anything yet", err=True)
        return
    from nemotron_launch.cli.job_tables import plain
    from nemotron_launch.cli.tables import print_table

    cells = [
        (
            one.label,
            made.type,
            f"{one.step} -c {one.config}",
            one.run_id,
            _day(one.record.created),
            _where(one, made.place),
        )
        for one, made in rows[:limit]
    ]
    print_table(("NAME", "TYPE", "STEP", "RUN", "MADE", "PATH"), [tuple(map(plain, row)) for row in cells], whole=1)
    if len(rows) > limit:
        click.echo(f"{len(rows) - limit} more: -n {len(rows)} shows all", err=True)


@click.command()
@NAME
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, as_json: bool) -> None:
    """Show what a run made: paths, step, config, inputs, code, metrics, tokenizer and architecture."""
    from nemotron_launch.artifacts import registry

    with opened() as ledger:
        one = registry.find_any(ledger, name)
        others = [
            label for run_id, label in registry.labels(ledger).items() if label == one.label and run_id != one.run_id
        ]
    if as_json:
        _print_json(_facts(one) | registry.as_data(one))
        return
    from nemotron_launch.cli import artifact_view

    artifact_view.print_entry(one, again=len(others))


@click.command()
@NAME
@click.option("--mermaid", "form", flag_value="mermaid", help="Print a Mermaid flowchart.")
@click.option("--json", "form", flag_value="json", help="Print JSON.")
def lineage(name: str, form: str | None) -> None:
    """Show of what a run or an artifact was made, back to its sources, and what was made of it."""
    from nemotron_launch.artifacts import lineage as lineages

    with opened() as ledger:
        found = lineages.of(ledger, name)
    if form == "json":
        _print_json(found.as_data())
    else:
        click.echo(lineages.mermaid(found) if form == "mermaid" else lineages.tree(found))


@click.command()
@click.option("--mermaid", "form", flag_value="mermaid", help="Print a Mermaid flowchart.")
@click.option("--json", "form", flag_value="json", help="Print JSON.")
def graph(form: str | None) -> None:
    """Show which step feeds which: of each artifact type who makes it, who takes it, and what converts it."""
    from nemotron_launch.artifacts import step_graph
    from nemotron_launch.catalog import load_artifacts, load_steps

    made = step_graph.step_graph(load_steps(), load_artifacts())
    if form == "json":
        _print_json(made.as_data())
    else:
        click.echo(step_graph.mermaid(made) if form == "mermaid" else step_graph.text(made))


def _facts(one: Entry) -> dict[str, Any]:
    return {
        "name": one.name, "version": one.version, "run_id": one.run_id, "step": one.step, "config": one.config,
        "created": one.record.created, "host": one.host, "executor": one.executor,
    }  # fmt: skip


def _where(one: Entry, path: str) -> str:
    """A path as one would write it here; with the host in front of it where it lies elsewhere."""
    import os
    from pathlib import Path

    from nemotron_launch.resources import display

    elsewhere = one.host and one.host != os.uname().nodename
    return f"{one.host}:{path}" if elsewhere else display(Path(path))


def _day(moment: float) -> str:
    return time.strftime("%F %H:%M", time.localtime(moment))


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=True))
