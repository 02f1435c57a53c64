"""What `steps run --sweep` does: every point checked first, then shown, or submitted together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_launch.catalog import Step
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.sweeps import Sweep, compile_sweep, read_points

if TYPE_CHECKING:
    from nemotron_launch.cli import submit
    from nemotron_launch.hosts import Upload
    from nemotron_launch.jobs.run import Run
    from nemotron_launch.profiles import Profile


@frozen
class Asked:
    """The options of `steps run` that a sweep has, as they were given; max_parallel 0 where it was not."""

    axes: tuple[str, ...]
    pairs: bool
    max_parallel: int
    run_id: str | None


def show_sweep(
    step: Step,
    config: Path,
    asked: Asked,
    overrides: Sequence[str],
    profile: Profile | None,
    passthrough: Sequence[str],
    attached: bool,
    output: str | None,
) -> int:
    """Compile a sweep and print it; 0."""
    from nemotron_launch.cli.sweep_view import show

    show(_compiled(step, config, asked, overrides, profile, passthrough, attached=attached), output)
    return 0


def submit_sweep(
    step: Step,
    config: Path,
    asked: Asked,
    overrides: Sequence[str],
    profile: Profile | None,
    passthrough: Sequence[str],
    how: submit.Asked,
) -> int:
    """Compile a sweep and submit its points together; the exit code of the command, attached that of the points."""
    from nemotron_launch.cli.jobs import warn
    from nemotron_launch.cli.submit import submit_all
    from nemotron_launch.jobs.sweep_submission import plan_submission

    sweep = _compiled(step, config, asked, overrides, profile, passthrough, attached=how.attached, submits=True)
    for warning in sweep.warnings:
        warn(warning)
    makers = _makers(sweep, passthrough) if sweep.array is None else []
    return submit_all([*makers, plan_submission(sweep)], how)


def _compiled(
    step: Step,
    config: Path,
    asked: Asked,
    overrides: Sequence[str],
    profile: Profile | None,
    passthrough: Sequence[str],
    **more: Any,
) -> Sweep:
    return compile_sweep(
        step,
        config,
        read_points(asked.axes, pairs=asked.pairs),
        overrides,
        profile,
        passthrough,
        max_parallel=asked.max_parallel,
        run_id=asked.run_id,
        **more,
    )


def _makers(sweep: Sweep, passthrough: Sequence[str]) -> list[tuple[Run, list[Upload], list[Run]]]:
    """On this machine: a run for each step that makes what points lack, once for all of them."""
    import click

    from nemotron_launch.backends.local import check_machine
    from nemotron_launch.inputs import stages
    from nemotron_launch.jobs.submission import new_run, uploads
    from nemotron_launch.render import render

    found: dict[str, tuple[Run, list[Upload], list[Run]]] = {}
    for n, (composed, job) in enumerate(zip(sweep.composed, sweep.jobs, strict=True)):
        check_machine(job)
        try:
            planned = stages(sweep.step, composed, sweep.profile, passthrough, run_id=sweep.run_id)
        except UserError as error:
            raise UserError(f"point {n}: {error.message}", where=error.where, hint=error.hint) from None
        for stage in planned[:-1]:
            if stage.job.output_dir not in found:
                click.echo(f"nemotron: {stage.why}", err=True)
                found[stage.job.output_dir] = new_run(stage.job), uploads(stage.job, render(stage.job)), []
    return list(found.values())
