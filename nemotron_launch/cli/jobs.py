"""`nemotron jobs …`: what became of the runs, and what can be done to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotron_launch.cli.main import LazyGroup
from nemotron_launch.jobs.ledger import LAST, Ledger
from nemotron_launch.jobs.settle import Backends, settle

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nemotron_launch.jobs.run import Run
    from nemotron_launch.jobs.status import Known

jobs = LazyGroup(
    "jobs",
    help="List, follow, cancel and resubmit runs. RUN is a run id, the unique start of one, or `last`.",
    no_args_is_help=True,
    lazy={
        "list": ("nemotron_launch.cli.jobs:list_runs", "List the runs, the newest first."),
        "status": ("nemotron_launch.cli.jobs:status", "Show how a run is, and how far."),
        "logs": ("nemotron_launch.cli.jobs:logs", "Print the logs of a run."),
        "attach": ("nemotron_launch.cli.jobs:attach", "Follow a run to its end, with its exit code."),
        "watch": ("nemotron_launch.cli.watch:watch", "Watch runs live: progress, curves, warnings, logs."),
        "wait": ("nemotron_launch.cli.jobs:wait", "Wait until runs are over."),
        "cancel": ("nemotron_launch.cli.jobs:cancel", "End runs."),
        "report": ("nemotron_launch.cli.report:report", "Write a page about runs: plots, warnings, config, samples."),
        "resubmit": ("nemotron_launch.cli.jobs:resubmit", "Submit a run again; it goes on from its last checkpoint."),
        "fetch": ("nemotron_launch.cli.jobs:fetch", "Copy what a run made to this machine."),
        "shell": ("nemotron_launch.cli.jobs:shell", "Open a terminal where a run is at work."),
        "prune": ("nemotron_launch.cli.jobs:prune", "Forget runs that were over long ago."),
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


def warn(text: str) -> None:
    sys.stdout.flush()
    click.echo(f"warning: {text}", err=True)


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
    from nemotron_launch.reports.collect import quick_warnings

    with opened() as (ledger, backends):
        found = refresh(ledger, backends, ledger.find(name), warn)
        progress = progress_of(backends, [one.run for one in found], warn)
        made = _made(ledger, backends, found)
        warnings = quick_warnings(backends, found[0].run) if len(found) == 1 and not as_json else []
    if as_json:
        data = [job_tables.as_data(one, progress.get(one.run.run_id), made.get(one.run.run_id, ())) for one in found]
        _print_json(data if found[0].run.sweep and len(found) > 1 else data[0])
    elif len(found) > 1:
        job_tables.print_points(found, progress)
    else:
        job_tables.print_run(found[0], progress.get(found[0].run.run_id), made.get(found[0].run.run_id, ()))
        job_tables.print_warnings(warnings)


def _made(ledger: Ledger, backends: Backends, found: Sequence[Known]) -> dict[str, Sequence[tuple[str, str, str]]]:
    """What finished runs made: label, type and path of each artifact, by run id."""
    finished = [one.run for one in found if one.run.state == "finished"]
    if not finished:
        return {}
    from nemotron_launch.artifacts import registry

    registry.register_finished(ledger, backends, warn, finished)
    entries = {run.run_id: entry for run in finished if (entry := registry.of_run(ledger, run.run_id))}
    return {
        run_id: [(entry.label, made.type, made.place) for made in entry.record.artifacts]
        for run_id, entry in entries.items()
    }


@click.command()
@RUN
@click.option("-f", "--follow", is_flag=True, help="Go on until the run is over.")
@click.option("--node", metavar="NAME", help="Only this log: node-0 or 0, job, or a service's name.")
@click.option("--attempt", type=click.IntRange(0), metavar="N", help="Only this attempt (default: the last).")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines of each log.")
def logs(name: str, follow: bool, node: str | None, attempt: int | None, tail: int | None) -> None:
    """Print the logs of a run, of the last attempt unless asked otherwise.

    Several nodes are told apart by a prefix. `job` is the log of the executor's own script.
    """
    from nemotron_launch.cli.following import print_logs
    from nemotron_launch.jobs.status import refresh

    with opened() as (ledger, backends):
        found = [one.run for one in refresh(ledger, backends, ledger.find(name), warn)]
        print_logs(ledger, backends, found, follows=follow, node=node, attempt=attempt, tail=tail)


@click.command()
@RUN
@click.option("--on-interrupt", type=click.Choice(["detach", "cancel"]), help="What Ctrl-C does (default: it asks).")
@click.pass_context
def attach(ctx: click.Context, name: str, on_interrupt: str | None) -> None:
    """Follow a run to its end: its state, then its logs from the beginning. Ends with the run's exit code.

    0 finished, 85 saved and stopped, 130 cancelled, 128 + n ended by signal n, else the trainer's own or 1.
    """
    from nemotron_launch.cli.following import follow_to_end

    with opened() as (ledger, backends):
        ctx.exit(follow_to_end(ledger, backends, ledger.find(name), on_interrupt=on_interrupt))


@click.command()
@RUNS
@click.option("-q", "--quiet", is_flag=True, help="Say nothing.")
@click.pass_context
def wait(ctx: click.Context, names: tuple[str, ...], quiet: bool) -> None:
    """Wait until all of these runs are over. Exit code: 0 when all finished, else that of the first that did not."""
    from nemotron_launch.cli.following import wait_for

    with opened() as (ledger, backends):
        ctx.exit(wait_for(ledger, backends, _named(ledger, names), quiet=quiet))


@click.command()
@RUNS
@click.option("--purge", is_flag=True, help="Delete the job too, with the log that the executor keeps (Lepton).")
def cancel(names: tuple[str, ...], purge: bool) -> None:
    """End runs for good: they are not restarted. A trainer that can saves first.

    On this machine a second `cancel` ends a run at once, without saving.
    """
    from nemotron_launch.jobs import actions
    from nemotron_launch.jobs.status import refresh

    with opened() as (ledger, backends):
        found = [one.run for one in refresh(ledger, backends, _named(ledger, names), warn)]
        if purge:
            actions.check_purge(found)
        live = {run.run_id for run in actions.cancel(backends, found)}
        after = refresh(ledger, backends, found, warn)
        purged = actions.purge(ledger, backends, [one.run for one in after], warn) if purge else set()
        for one in refresh(ledger, backends, [one.run for one in after], warn):
            over = one.run.run_id not in live
            ending = "is ending" if one.run.state in ("pending", "running", "submitting") else one.run.state
            text = f"was over already, {one.run.state}" if over else ending
            click.echo(f"{one.run.run_id}: {text}{'; its job is deleted' * (one.run.run_id in purged)}")


@click.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print the run as JSON.")
def resubmit(name: str, as_json: bool) -> None:
    """Submit a run again that ended before it had finished, exactly as it was; it goes on from its last checkpoint.

    Of a sweep the points that did not finish. Secrets are taken from the environment again.
    """
    from nemotron_launch.cli import submit
    from nemotron_launch.jobs import actions
    from nemotron_launch.jobs.status import refresh

    with opened() as (ledger, backends):
        found = [one.run for one in refresh(ledger, backends, ledger.find(name), warn)]
        rows = actions.resubmit(ledger, backends, found)
    if as_json:
        _print_json(submit.as_data(rows))
    else:
        submit.say_submitted(rows, attached=False)


@click.command()
@RUN
@click.option("--metrics", "what", flag_value="metrics", default="metrics", help="Numbers and logs (the default).")
@click.option("--checkpoints", "what", flag_value="checkpoints", help="The newest complete checkpoint.")
@click.option("--all", "what", flag_value="all", help="All of its output, and logs.")
@click.option("--to", type=click.Path(path_type=Path), metavar="DIR", help="Where to (default: a folder of its name).")
def fetch(name: str, what: str, to: Path | None) -> None:
    """Copy what a run made to this machine; of a sweep, a folder a point."""
    from nemotron_launch.jobs import actions
    from nemotron_launch.resources import display

    with opened() as (ledger, backends):
        found = ledger.find(name)
        for run in found:
            home = (to or Path(run.sweep or run.run_id)) / (f"point-{run.point}" if len(found) > 1 else "")
            for path in actions.fetch(backends.of(run).host, run, home, what=what):
                click.echo(display(path))


@click.command()
@RUN
@click.pass_context
def shell(ctx: click.Context, name: str) -> None:
    """Open a terminal on the first node of a run that is at work, in its container."""
    from nemotron_launch.errors import UserError
    from nemotron_launch.jobs.status import refresh

    with opened() as (ledger, backends):
        run = refresh(ledger, backends, _one(ledger, name), warn)[0].run
        if run.state != "running":
            raise UserError(f"{run.run_id} is {run.state}: there is nowhere to be", exit_code=1)
        ctx.exit(backends.of(run).shell(run))


@click.command()
@click.option("--older-than", type=click.FloatRange(0), default=30, metavar="DAYS", help="Days since they ended: 30.")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only runs in this state; may be repeated.")
@click.option("-y", "--yes", is_flag=True, help="Do it without asking.")
@click.option("-d", "--dry-run", is_flag=True, help="Only show what would be removed.")
def prune(older_than: float, states: tuple[str, ...], yes: bool, dry_run: bool) -> None:
    """Forget runs that were over long ago: their rows, kept files and run folders. What they made stays.

    Shows what it would remove, then asks; where it cannot ask, it needs --yes. Live runs are never touched.
    """
    from nemotron_launch.errors import UserError
    from nemotron_launch.jobs import actions
    from nemotron_launch.jobs.status import listed

    with opened() as (ledger, backends):
        listed(ledger, backends, warn, states=states, limit=1)  # whether the states exist, and who still lives
        found = actions.prunable(ledger, older_than=older_than * 86400, states=states)
        for one in found:
            click.echo(f"{one.name}  {one.runs[0].state}  {one.folder or '(its folder stays)'}")
        if not found or dry_run:
            click.echo(f"{len(found)} runs to forget", err=True)
            return
        if not yes:
            if not sys.stdin.isatty():
                raise UserError(f"{len(found)} runs would be forgotten", hint="--yes does it, --dry-run only shows it")
            click.confirm(f"Forget these {len(found)} runs?", abort=True, err=True)
        actions.prune(ledger, backends, found)


def _named(ledger: Ledger, names: Sequence[str]) -> list[Run]:
    """The runs of several names, each once."""
    return list({run.run_id: run for name in names for run in ledger.find(name)}.values())


def _one(ledger: Ledger, name: str) -> list[Run]:
    from nemotron_launch.errors import UserError

    found = ledger.find(name)
    if len(found) > 1:
        hint = f"a point of it is, for example, {found[0].run_id}"
        raise UserError(f"{found[0].sweep} is a sweep of {len(found)} points", hint=hint)
    return found


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=True))
