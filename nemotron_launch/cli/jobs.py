"""`nemotron jobs …`: what became of the runs, and what can be done to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nemotron_launch.cli.main import LazyGroup
from nemotron_launch.cli.submit import warn
from nemotron_launch.jobs.ledger import LAST, Ledger
from nemotron_launch.jobs.settle import Backends, settle

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

jobs = LazyGroup(
    "jobs",
    help="List, follow, cancel and resubmit runs. RUN is a run id, the unique start of one, or `last`.",
    no_args_is_help=True,
    lazy={
        "list": ("nemotron_launch.cli.jobs:list_runs", "List the runs, the newest first."),
        "status": ("nemotron_launch.cli.jobs:status", "Show how a run is, and how far."),
    },
)


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Run ids, newest first. Silent where the ledger is broken."""
    from click.shell_completion import CompletionItem

    from nemotron_launch.errors import UserError

    try:
        with Ledger() as ledger:
            names = ledger.names(incomplete)
    except UserError:
        return []
    return [CompletionItem(name) for name in [*names[:100], *([LAST] if LAST.startswith(incomplete) else [])]]


RUN = click.argument("name", metavar="RUN", shell_complete=complete_run)
RUNS = click.argument("names", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_run)


@contextmanager
def opened() -> Iterator[tuple[Ledger, Backends]]:
    """The ledger, made true, and the executors."""
    with Ledger() as ledger, Backends() as backends:
        settle(ledger, backends, warn)
        yield ledger, backends


@click.command("list")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only runs in this state; may be repeated.")
@click.option("--step", metavar="ID", help="Only runs of this step.")
@click.option("--profile", metavar="NAME", help="Only runs of this profile.")
@click.option("-n", "--limit", type=click.IntRange(1), default=30, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_runs(states: tuple[str, ...], step: str | None, profile: str | None, limit: int, as_json: bool) -> None:
    """List the runs, the newest first."""
    from nemotron_launch.cli import job_tables
    from nemotron_launch.jobs.status import listed

    with opened() as (ledger, backends):
        found = listed(ledger, backends, warn, states=states, step=step, profile=profile, limit=limit)
    if as_json:
        _print_json([job_tables.as_data(one) for one in found])
    else:
        job_tables.print_list(found)


@click.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(name: str, as_json: bool) -> None:
    """Show how a run is: state, reason, exit code, nodes, progress, last checkpoint; of a sweep, a row a point."""
    from nemotron_launch.cli import job_tables
    from nemotron_launch.jobs.status import progress_of, refresh

    with opened() as (ledger, backends):
        found = refresh(ledger, backends, ledger.find(name), warn)
        progress = progress_of(backends, [one.run for one in found], warn)
    if as_json:
        data = [job_tables.as_data(one, progress.get(one.run.run_id)) for one in found]
        _print_json(data if found[0].run.sweep and len(found) > 1 else data[0])
    elif len(found) > 1:
        job_tables.print_points(found, progress)
    else:
        job_tables.print_run(found[0], progress.get(found[0].run.run_id))


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=True))
