"""`nemotron steps check|diff`: what CI runs, and how two compiled jobs differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemotron_launch.catalog import find_step, load_steps
from nemotron_launch.cli.steps import PROFILES, complete
from nemotron_launch.errors import UserError
from nemotron_launch.resources import display

if TYPE_CHECKING:
    from nemotron_launch.matrix import Result


@click.command()
@click.argument("step_ids", nargs=-1, metavar="[STEP]...", shell_complete=complete("step"))
@click.option("--profile", "profile_names", multiple=True, metavar="NAME", shell_complete=complete("profile"))
@click.option("--config", "-c", "configs", multiple=True, metavar="NAME|PATH", help="Only these configs.")
@click.option("--against", type=click.Path(path_type=Path), metavar="DIR", help="Compare with the renderings there.")
@click.option("--update", is_flag=True, help="Write the renderings instead of comparing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit's XML too.")
@click.option("--test-only", is_flag=True, help="Ask sbatch --test-only about Slurm scripts.")
@PROFILES
@click.pass_context
def check(
    ctx: click.Context,
    step_ids: tuple[str, ...],
    profile_names: tuple[str, ...],
    configs: tuple[str, ...],
    against: Path | None,
    update: bool,
    as_json: bool,
    junit: Path | None,
    test_only: bool,
    profiles: Path | None,
) -> None:
    """Compile every step with every config and every profile that fit, and say what is wrong.

    A profile that bears a step's id, as slurm_rl_nemo_rl_dpo does, goes with that step alone. Scripts go through
    bash -n, Lepton's specs through their schema. Exit code 1 when something is wrong or differs from its rendering.
    """
    from nemotron_launch import matrix

    if update and against is None:
        raise UserError("--update goes with --against: it says where the renderings are")
    known = load_steps()
    steps = [find_step(name, known) for name in step_ids] or known
    chosen = matrix.cases(steps, configs, profile_names, profiles)
    if not chosen:
        raise UserError("no step, config and profile fit each other")
    whole = not (step_ids or configs or profile_names)
    results = matrix.check(chosen, against=against, update=update, whole=whole, test_only=test_only, path=profiles)
    if junit is not None:
        _write(junit, matrix.junit(results))
    if as_json:
        click.echo(json.dumps(matrix.as_data(results), indent=2, ensure_ascii=False))
    else:
        _print(results)
    ctx.exit(0 if all(result.ok for result in results) else 1)


def _print(results: list[Result]) -> None:
    wrong = [result for result in results if not result.ok]
    for result in wrong:
        click.secho(f"{result.case.step.id} -c {result.case.config.stem}, profile {result.case.profile}", bold=True)
        for problem in result.problems:
            click.echo("\n".join(f"  {line}" for line in problem.splitlines()))
        for line in result.diff.splitlines():
            colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1]) if sys.stdout.isatty() else None
            click.secho(f"  {line}", fg=colour)
        click.echo()
    click.echo(
        f"{len(results)} compiled, {len(wrong)} wrong" if wrong else f"{len(results)} compiled, all as they should be"
    )


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {(error.strerror or str(error)).lower()}", where=display(path)) from None


@click.command()
@click.argument("a")
@click.argument("b")
@PROFILES
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, profiles: Path | None) -> None:
    """Show how two compiled jobs differ, by config key and by rendered line.

    A and B are each a job's folder, a stored rendering, or ID[:CONFIG[:PROFILE]], which is compiled:
    nemotron steps diff dpo:default:slurm dpo:tiny:slurm. Exit code 1 when they differ.
    """
    from nemotron_launch import jobdiff

    text = jobdiff.compare(jobdiff.load(a, profiles_path=profiles), jobdiff.load(b, profiles_path=profiles))
    for line in text.splitlines():
        colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1]) if sys.stdout.isatty() else None
        click.secho(line, fg=colour)
    ctx.exit(1 if text else 0)
