"""`nemotron steps list|show|run`; `check` and `diff` are in cli/check.py, `probe` in cli/probe.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotron_launch.catalog import Step, find_config, find_step, load_artifacts, load_steps, select
from nemotron_launch.cli.main import LazyGroup
from nemotron_launch.errors import UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nemotron_launch.cli.submit import Asked
    from nemotron_launch.job import Job
    from nemotron_launch.profiles import Profile

steps = LazyGroup(
    "steps",
    help="List, show, run and check steps.",
    no_args_is_help=True,
    lazy={
        "list": ("nemotron_launch.cli.steps:list_steps", "List the steps."),
        "show": ("nemotron_launch.cli.steps:show", "Show all that a step's manifest says."),
        "run": ("nemotron_launch.cli.steps:run", "Run a step with a config, a profile and overrides."),
        "probe": ("nemotron_launch.cli.probe:probe", "Score rollouts of a step's policy, without training."),
        "graph": ("nemotron_launch.cli.artifacts:graph", "Show which step feeds which."),
        "check": ("nemotron_launch.cli.check:check", "Compile every step, config and profile, and compare."),
        "diff": ("nemotron_launch.cli.check:diff", "Show how two compiled jobs differ."),
    },
)


def complete(what: str) -> Any:
    """Completion for ids, configs, profiles, artifact types, categories and tags. Silent where something is broken."""

    def candidates(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        try:
            names = _candidates(what, ctx)
        except UserError:
            return []
        return [CompletionItem(name, help=text) for name, text in names.items() if name.startswith(incomplete)]

    return candidates


def _candidates(what: str, ctx: click.Context) -> dict[str, str]:
    if what == "profile":
        from nemotron_launch.profiles import list_profiles

        return {entry.name: entry.description for entry in list_profiles(profiles_path=ctx.params.get("profiles"))}
    if what == "run":
        from nemotron_launch.jobs.ledger import Ledger

        with Ledger() as ledger:
            return dict.fromkeys(ledger.names(), "")
    known = load_steps()
    if what == "step":
        return {step.id: step.summary for step in known}
    if what == "config":
        # With an option still unfinished click has not parsed the id yet.
        words = [word for word in ctx.meta.get("nemotron.words", ()) if not word.startswith("-")]
        return dict.fromkeys(find_step(words[0], known).configs(), "") if words else {}
    if what == "type":
        return {name: artifact.description for name, artifact in load_artifacts().items()}
    if what == "category":
        return dict.fromkeys(sorted({step.category for step in known}), "")
    return dict.fromkeys(sorted({tag for step in known for tag in step.tags}), "")


@click.command("list")
@click.option("--category", metavar="NAME", shell_complete=complete("category"), help="Only this category.")
@click.option(
    "--consumes", metavar="TYPE", shell_complete=complete("type"), help="Only steps that can take this artifact."
)
@click.option(
    "--produces", metavar="TYPE", shell_complete=complete("type"), help="Only steps whose output can serve as this."
)
@click.option("--tag", metavar="TAG", shell_complete=complete("tag"), help="Only steps with this tag.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_steps(
    category: str | None, consumes: str | None, produces: str | None, tag: str | None, as_json: bool
) -> None:
    """List the steps.

    An artifact's subtype counts as the artifact: synthetic_jsonl is a training_jsonl, so --consumes synthetic_jsonl
    finds every step that takes training_jsonl, and --produces training_jsonl every step that makes synthetic_jsonl.
    """
    found = select(load_steps(), load_artifacts(), category=category, consumes=consumes, produces=produces, tag=tag)
    if as_json:
        _print_json([step.as_json() for step in found])
        return
    from nemotron_launch.cli.tables import print_steps

    print_steps(found)


@click.command()
@click.argument("step_id", metavar="ID", shell_complete=complete("step"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(step_id: str, as_json: bool) -> None:
    """Show all that a step's manifest says: inputs, outputs, parameters, strategies, errors and how to recover.

    ID is a step's id, or its unique end: dpo for rl/nemo_rl/dpo.
    """
    step = find_step(step_id)
    if as_json:
        _print_json(step.as_json())
        return
    from nemotron_launch.cli.tables import print_step

    print_step(step)


_LONG = {"-c": "--config", "-r": "--run", "-b": "--batch", "-d": "--dry-run"}


class RunCommand(click.Command):
    """Remembers where `--` stood: what follows it is the step's, whatever it looks like."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        ctx.meta["nemotron.words"] = tuple(args)
        ctx.meta["nemotron.passthrough"] = tuple(args[split + 1 :])
        # Click looks for a long option like each short one, with suggestions, before it takes the short one.
        return super().parse_args(ctx, [_LONG.get(word, word) for word in args[:split]])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["ID", "[-c CONFIG]", "[-r PROFILE | -b PROFILE]", "[-d]", "[KEY=VALUE]...", "[-- ARGUMENT...]"]


PROFILES = click.option(
    "--profiles", type=click.Path(path_type=Path), metavar="PATH", help="Look for profiles here first."
)


_JOB = (
    click.argument("step_id", metavar="ID", shell_complete=complete("step")),
    click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]..."),
    click.option(
        "-c",
        "--config",
        metavar="NAME|PATH",
        shell_complete=complete("config"),
        help="Config (default: default).",
    ),
    click.option(
        "-r",
        "--run",
        "attached",
        metavar="PROFILE",
        shell_complete=complete("profile"),
        help="Run there and follow.",
    ),
    click.option(
        "-b",
        "--batch",
        "detached",
        metavar="PROFILE",
        shell_complete=complete("profile"),
        help="Submit there and return.",
    ),
    click.option("-d", "--dry-run", is_flag=True, help="Print the compiled job and run nothing."),
    PROFILES,
)


def asks_for_job(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments and options that say what job is meant: step, config, overrides, profile, whether to run it."""
    for option in reversed(_JOB):
        command = option(command)
    return command


@click.command(cls=RunCommand)
@asks_for_job
@click.option("--output", metavar="FORM", help="With -d: json, yaml, script, or dir=PATH for all files.")
@click.option("--run-id", metavar="ID", help="Name the run yourself.")
@click.option(
    "--sweep",
    "axes",
    multiple=True,
    metavar="KEY=VALUES",
    help="Run a point for each value (1,2,3, choice(…), range(…), logspace(…)); several make every combination.",
)
@click.option("--zip", "pairs", is_flag=True, help="Pair the values of several --sweep instead.")
@click.option("--max-parallel", type=click.IntRange(min=1), metavar="N", help="Run at most N points at a time.")
@click.option(
    "--after", multiple=True, metavar="RUN", shell_complete=complete("run"), help="Start when this run has finished."
)
@click.option(
    "--on-interrupt", type=click.Choice(["detach", "cancel"]), help="What Ctrl-C does with -r (default: it asks)."
)
@click.option("--json", "as_json", is_flag=True, help="With -b: print the run as JSON.")
@click.option("--force-squash", is_flag=True, help="Import the container image anew (Slurm).")
@click.pass_context
def run(
    ctx: click.Context,
    step_id: str,
    arguments: tuple[str, ...],
    config: str | None,
    attached: str | None,
    detached: str | None,
    dry_run: bool,
    profiles: Path | None,
    output: str | None,
    run_id: str | None,
    axes: tuple[str, ...],
    pairs: bool,
    max_parallel: int | None,
    after: tuple[str, ...],
    on_interrupt: str | None,
    as_json: bool,
    force_squash: bool,
) -> None:
    """Run a step, on this machine or where a profile says.

    ID is a step's id, or its unique end: dpo for rl/nemo_rl/dpo. CONFIG is a name (steps show ID lists them) or the
    path of a YAML file. PROFILE is a name (nemotron profiles list) or the path of one.

    \b
    Overrides are Hydra's:
      a.b=1      change a key that exists
      +a.b=1     add a new key          ++a.b=1   either
      ~a.b       delete a key           a='[1,2]' a list, '{x: 1}' a mapping
    Lowest first: the step's defaults, the config, the profile, the command line.

    \b
    With -d nothing runs. In a pipe it prints the script or spec that would be submitted, on a terminal a summary too.

    The exit code is the step's own: 0 finished, 1 failed, 2 bad input, 85 stopped and saved (the same command resumes).
    """
    overrides = [argument for argument in arguments if is_override(argument)]
    words = [argument for argument in arguments if not is_override(argument)]
    passthrough = (*words, *ctx.meta["nemotron.passthrough"])
    if attached is not None and detached is not None:
        raise UserError("-r and -b exclude each other", hint="-r runs and follows, -b submits and returns")
    _check_options(attached, detached, dry_run, after, on_interrupt, as_json)
    if output is not None and not dry_run:
        raise UserError("--output goes with -d: it is the form of a dry run")
    if output is not None and output not in ("json", "yaml", "script") and output.removeprefix("dir=") in (output, ""):
        raise UserError(f"--output takes json, yaml, script or dir=PATH, got {output!r}")
    if not axes and (pairs or max_parallel is not None):
        raise UserError(f"{'--zip' if pairs else '--max-parallel'} goes with --sweep")
    step = find_step(step_id)
    path = find_config(step, config)
    profile = load_profile_of(attached or detached, profiles, force_squash)
    if axes:
        from nemotron_launch.cli import sweeps

        sweep = sweeps.Asked(axes, pairs, max_parallel or 0, run_id)
        if dry_run:
            ctx.exit(sweeps.show_sweep(step, path, sweep, overrides, profile, passthrough, detached is None, output))
        how = _how(detached is None, after, on_interrupt, as_json, force_squash)
        ctx.exit(sweeps.submit_sweep(step, path, sweep, overrides, profile, passthrough, how))
    if dry_run:
        dry_run_of(step, path, overrides, profile, passthrough, detached is None, run_id, output)
    elif profile is not None and (detached is not None or profile.executor != "local"):
        from nemotron_launch.cli.submit import submit_run

        how = _how(detached is None, after, on_interrupt, as_json, force_squash)
        ctx.exit(submit_run(step, path, overrides, passthrough, profile, how, run_id=run_id))
    else:
        if after or on_interrupt:
            raise UserError(
                f"{'--after' if after else '--on-interrupt'} is for runs that are submitted",
                hint="here:  -b, then jobs attach",
            )
        from nemotron_launch.backends.local import run_stages

        ctx.exit(run_stages(step, path, overrides, passthrough, profile, run_id=run_id))


def _how(attached: bool, after: tuple[str, ...], on_interrupt: str | None, as_json: bool, force_squash: bool) -> Asked:
    from nemotron_launch.cli.submit import Asked

    return Asked(attached, after, on_interrupt, as_json, force_squash)


def _check_options(
    attached: str | None,
    detached: str | None,
    dry_run: bool,
    after: tuple[str, ...],
    on_interrupt: str | None,
    as_json: bool,
) -> None:
    if as_json and (detached is None or dry_run):
        raise UserError("--json goes with -b: it prints the run that was submitted")
    if on_interrupt and attached is None:
        raise UserError("--on-interrupt goes with -r: it says what Ctrl-C does")
    if after and attached is None and detached is None:
        raise UserError("--after goes with -b or -r: a run that is submitted can wait for another one")


def load_profile_of(name: str | None, profiles: Path | None, force_squash: bool) -> Profile | None:
    if name is None:
        if force_squash:
            raise UserError("--force-squash goes with a Slurm profile, which imports images")
        return None
    from nemotron_launch.profiles import load_profile

    profile = load_profile(name, profiles_path=profiles)
    if force_squash and (profile.executor != "slurm" or profile.data.get("runtime") != "pyxis"):
        raise profile.problem("executor", "--force-squash has nothing to import here", "it goes with Slurm and pyxis")
    return profile


def dry_run_of(
    step: Step,
    config: Path,
    overrides: list[str],
    profile: Profile | None,
    passthrough: tuple[str, ...],
    attached: bool,
    run_id: str | None,
    output: str | None,
) -> None:
    if profile is None and output is None and not sys.stdout.isatty():
        from nemotron_launch.plan import compose_for, plan_job

        composed = compose_for(step, config, overrides)
        _print_composed(plan_job(step, composed, None, passthrough, run_id=run_id), composed.data)
        return
    from nemotron_launch.cli.job_view import show as show_job
    from nemotron_launch.compiler import compile_job

    job = compile_job(step, config, overrides, profile, passthrough, run_id=run_id, attached=attached)
    show_job(job, output)


def _print_composed(job: Job, data: dict[str, Any]) -> None:
    """A dry run on this machine, in a pipe: the composed config as YAML, with what would run as comments above it."""
    import shlex

    from nemotron_launch.config.yaml_files import dump

    head = [f"{job.step} -c {job.config}, on this machine", shlex.join(job.command)]
    click.echo("".join(f"# {line}\n" for part in head for line in part.splitlines()) + dump(data), nl=False)


def is_override(argument: str) -> bool:
    return "=" in argument or argument.startswith(("~", "+"))


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False))
