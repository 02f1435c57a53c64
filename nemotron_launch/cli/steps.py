"""`nemotron steps list|show|run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from nemotron_launch.catalog import Step, find_config, find_step, load_artifacts, load_steps, select
from nemotron_launch.cli.main import LazyGroup
from nemotron_launch.errors import UserError

if TYPE_CHECKING:
    from nemotron_launch.config.compose import Composed
    from nemotron_launch.job import Job

steps = LazyGroup(
    "steps",
    help="List, show and run steps.",
    no_args_is_help=True,
    lazy={
        "list": ("nemotron_launch.cli.steps:list_steps", "List the steps."),
        "show": ("nemotron_launch.cli.steps:show", "Show all that a step's manifest says."),
        "run": ("nemotron_launch.cli.steps:run", "Run a step with a config and overrides."),
    },
)


def _complete(what: str) -> Any:
    """Completion for ids, configs, artifact types, categories and tags. Silent where something is broken."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            names = _candidates(what, ctx)
        except UserError:
            return []
        return [CompletionItem(name, help=text) for name, text in names.items() if name.startswith(incomplete)]

    return complete


def _candidates(what: str, ctx: click.Context) -> dict[str, str]:
    known = load_steps()
    if what == "step":
        return {step.id: step.summary for step in known}
    if what == "config":
        # With an option still unfinished click has not parsed the id yet.
        words = [word for word in ctx.meta["nemotron.words"] if not word.startswith("-")]
        return dict.fromkeys(find_step(words[0], known).configs(), "") if words else {}
    if what == "type":
        return {name: artifact.description for name, artifact in load_artifacts().items()}
    if what == "category":
        return dict.fromkeys(sorted({step.category for step in known}), "")
    return dict.fromkeys(sorted({tag for step in known for tag in step.tags}), "")


@click.command("list")
@click.option("--category", metavar="NAME", shell_complete=_complete("category"), help="Only this category.")
@click.option(
    "--consumes", metavar="TYPE", shell_complete=_complete("type"), help="Only steps that can take this artifact."
)
@click.option(
    "--produces", metavar="TYPE", shell_complete=_complete("type"), help="Only steps whose output can serve as this."
)
@click.option("--tag", metavar="TAG", shell_complete=_complete("tag"), help="Only steps with this tag.")
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
@click.argument("step_id", metavar="ID", shell_complete=_complete("step"))
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


class _RunCommand(click.Command):
    """Remembers where `--` stood: what follows it is the step's, whatever it looks like."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        ctx.meta["nemotron.words"] = tuple(args)
        ctx.meta["nemotron.passthrough"] = tuple(args[split + 1 :])
        return super().parse_args(ctx, args[:split])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["ID", "[-c CONFIG]", "[-d]", "[KEY=VALUE]...", "[-- ARGUMENT...]"]


@click.command(cls=_RunCommand)
@click.argument("step_id", metavar="ID", shell_complete=_complete("step"))
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "-c", "--config", metavar="NAME|PATH", shell_complete=_complete("config"), help="Config (default: default)."
)
@click.option("-d", "--dry-run", is_flag=True, help="Print the composed config and the command, and run nothing.")
@click.pass_context
def run(ctx: click.Context, step_id: str, arguments: tuple[str, ...], config: str | None, dry_run: bool) -> None:
    """Run a step on this machine.

    ID is a step's id, or its unique end: dpo for rl/nemo_rl/dpo. CONFIG is a name (steps show ID lists them) or the
    path of a YAML file.

    \b
    Overrides are Hydra's:
      a.b=1      change a key that exists
      +a.b=1     add a new key          ++a.b=1   either
      ~a.b       delete a key           a='[1,2]' a list, '{x: 1}' a mapping

    The exit code is the step's own: 0 finished, 1 failed, 2 bad input, 85 stopped and saved (the same command resumes).
    """
    overrides = [argument for argument in arguments if _is_override(argument)]
    words = [argument for argument in arguments if not _is_override(argument)]
    passthrough = (*words, *ctx.meta["nemotron.passthrough"])
    step = find_step(step_id)
    if dry_run:
        _print_dry_run(step, find_config(step, config), overrides, passthrough)
        return
    from nemotron_launch.backends.local import run_stages

    ctx.exit(run_stages(step, find_config(step, config), overrides, passthrough))


def _is_override(argument: str) -> bool:
    return "=" in argument or argument.startswith(("~", "+"))


def _print_dry_run(step: Step, config: Path, overrides: list[str], passthrough: tuple[str, ...]) -> None:
    from nemotron_launch.plan import compose_for, plan_job

    composed = compose_for(step, config, overrides)
    job = plan_job(step, composed, None, passthrough)
    text = _dry_run_text(job, composed)
    if sys.stdout.isatty():
        from nemotron_launch.cli.tables import print_yaml

        print_yaml(text)
    else:
        click.echo(text, nl=False)


def _dry_run_text(job: Job, composed: Composed) -> str:
    """YAML: the composed config, and above it, as comments, what would run and where."""
    import shlex

    from nemotron_launch.config.yaml_files import dump

    head = [f"{job.step} -c {job.config}, on this machine", shlex.join(job.command)]
    return "".join(f"# {line}\n" for line in head) + dump(composed.data)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False))
