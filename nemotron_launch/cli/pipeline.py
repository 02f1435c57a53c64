"""`nemotron pipeline run|status`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemotron_launch.cli.main import LazyGroup
from nemotron_launch.cli.steps import PROFILES, RunCommand, complete
from nemotron_launch.errors import UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nemotron_launch.jobs.ledger import Ledger
    from nemotron_launch.pipelines.file import Pipeline

pipeline = LazyGroup(
    "pipeline",
    help="Run several steps as one, each on what others made. FILE is a path, or a shipped pipeline's name.",
    no_args_is_help=True,
    lazy={
        "run": ("nemotron_launch.cli.pipeline:run", "Run the stages that are not done."),
        "status": ("nemotron_launch.cli.pipeline:status", "Show how the stages are."),
    },
)


def _complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from nemotron_launch.resources import pipelines_dir

    names = sorted(path.stem for path in pipelines_dir().glob("*.yaml"))
    return [*(CompletionItem(name) for name in names if name.startswith(incomplete)), CompletionItem("", type="file")]


class _Command(RunCommand):
    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["FILE", "[OPTIONS]", "[STAGE.KEY=VALUE]..."]


_FILE = click.argument("file", metavar="FILE", shell_complete=_complete_file)
_WORDS = click.argument("words", nargs=-1, metavar="[STAGE.KEY=VALUE]...")


@click.command(cls=_Command)
@_FILE
@_WORDS
@click.option(
    "-r", "--run", "attached", metavar="PROFILE", shell_complete=complete("profile"), help="Run there and stay."
)
@click.option(
    "-b",
    "--batch",
    "detached",
    metavar="PROFILE",
    shell_complete=complete("profile"),
    help="Submit all there, each job after those that it needs, and return.",
)
@click.option("-d", "--dry-run", is_flag=True, help="Print every job and run nothing.")
@click.option("--output", metavar="FORM", help="With -d: json, yaml, script, or dir=PATH for all files.")
@click.option("--from", "first", metavar="STAGE", help="Run this stage and those behind it again.")
@click.option("--until", "last", metavar="STAGE", help="Run only this stage and what it needs.")
@PROFILES
@click.option("--on-interrupt", type=click.Choice(["detach", "cancel"]), help="What Ctrl-C does with -r.")
@click.option("--json", "as_json", is_flag=True, help="With -b: print the jobs as JSON.")
@click.pass_context
def run(
    ctx: click.Context,
    file: str,
    words: tuple[str, ...],
    attached: str | None,
    detached: str | None,
    dry_run: bool,
    output: str | None,
    first: str | None,
    last: str | None,
    profiles: Path | None,
    on_interrupt: str | None,
    as_json: bool,
) -> None:
    """Run a pipeline: every stage that is not done, here or where profiles say.

    All stages are compiled and checked first. A stage is done when its results are there, made with the same config
    from the same inputs; one that was interrupted goes on. So the same command goes on wherever the last one ended.

    \b
    Without -r and -b stages run on this machine, but for those whose profile the file names.
    Overrides begin with the stage's name: sft.policy.train_global_batch_size=32. output_dir=PATH is the pipeline's.

    The exit code is that of the first stage that fails.
    """
    from nemotron_launch.pipelines.compile import compile_pipeline

    _check_options(ctx, attached, detached, dry_run, output, on_interrupt, as_json)
    loaded, left = _load(file, words)
    for name in filter(None, (first, last)):
        loaded.stage(name, "--from" if name == first else "--until")
    planned = compile_pipeline(
        loaded,
        profile=attached or detached,
        profiles_path=profiles,
        words=left,
        attached=detached is None,
        to_run=not dry_run,
    )
    if dry_run:
        from nemotron_launch.cli.pipeline_view import show

        chosen = loaded.behind([first]) if first else {one.name for one in planned}
        chosen &= loaded.before([last]) if last else chosen
        show(loaded, [one for one in planned if one.name in chosen], output)
        return
    from nemotron_launch.cli.jobs import opened, warn
    from nemotron_launch.cli.pipeline_terminal import Terminal
    from nemotron_launch.pipelines.run import run_pipeline

    with opened() as (ledger, backends):
        terminal = Terminal(ledger, backends, attached=detached is None, on_interrupt=on_interrupt, as_json=as_json)
        try:
            code = run_pipeline(
                loaded, planned, ledger, backends, terminal, warn, attached=detached is None, first=first, last=last
            )
        finally:
            terminal.close()
        ctx.exit(code)


def _check_options(
    ctx: click.Context,
    attached: str | None,
    detached: str | None,
    dry_run: bool,
    output: str | None,
    on_interrupt: str | None,
    as_json: bool,
) -> None:
    if ctx.meta["nemotron.passthrough"]:
        raise UserError("a pipeline takes no arguments behind --")
    if attached is not None and detached is not None:
        raise UserError("-r and -b exclude each other", hint="-r runs and stays, -b submits and returns")
    if as_json and (detached is None or dry_run):
        raise UserError("--json goes with -b: it prints the jobs that were submitted")
    if on_interrupt and attached is None:
        raise UserError("--on-interrupt goes with -r: it says what Ctrl-C does")
    if output is not None and not dry_run:
        raise UserError("--output goes with -d: it is the form of a dry run")
    if output is not None and output not in ("json", "yaml", "script") and output.removeprefix("dir=") in (output, ""):
        raise UserError(f"--output takes json, yaml, script or dir=PATH, got {output!r}")


def _load(file: str, words: Sequence[str]) -> tuple[Pipeline, list[str]]:
    """The pipeline, and the overrides of its stages; output_dir=… is the pipeline's own."""
    from nemotron_launch.config.overrides import parse_override
    from nemotron_launch.pipelines.file import find_pipeline, load_pipeline

    own = [word for word in words if word.startswith("output_dir=")]
    folder = str(parse_override(own[-1]).value) if own else None
    return load_pipeline(find_pipeline(file), folder), [word for word in words if word not in own]


@click.command(cls=_Command)
@_FILE
@_WORDS
@click.option(
    "-p",
    "--profile",
    metavar="PROFILE",
    shell_complete=complete("profile"),
    help="Where it runs (default: where its newest run did).",
)
@PROFILES
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(file: str, words: tuple[str, ...], profile: str | None, profiles: Path | None, as_json: bool) -> None:
    """Show how the stages of a pipeline are: state, run and folder of each.

    Takes the overrides that it was run with: with others, configs have changed.
    """
    from nemotron_launch.cli import pipeline_terminal
    from nemotron_launch.cli.jobs import opened, warn
    from nemotron_launch.pipelines.compile import compile_pipeline
    from nemotron_launch.pipelines.standing import standings

    loaded, left = _load(file, words)
    with opened() as (ledger, backends):
        where = profile or _last_profile(ledger, loaded)
        planned = compile_pipeline(loaded, profile=where, profiles_path=profiles, words=left)
        found = list(standings(loaded, planned, ledger, backends, warn, asked=True).values())
    if as_json:
        click.echo(json.dumps([pipeline_terminal.as_data(one) for one in found], indent=2, ensure_ascii=False))
    else:
        pipeline_terminal.print_standings(found)


def _last_profile(ledger: Ledger, loaded: Pipeline) -> str | None:
    """The profile of the newest run of this pipeline, of a stage that names none itself."""
    own = {stage.name for stage in loaded.stages if stage.profile is None}
    file = str(loaded.file.absolute())
    runs = ledger.runs(limit=1, where=lambda run: run.pipeline == file and run.stage in own)
    return runs[0].profile or None if runs else None
