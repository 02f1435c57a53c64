"""What `steps run --sweep` does: every point checked first, then shown, or submitted together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_launch.catalog import Step
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.sweeps import compile_sweep, read_points

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile


@frozen
class Asked:
    """The options of `steps run` that a sweep has, as they were given."""

    axes: tuple[str, ...]
    pairs: bool
    max_parallel: int
    run_id: str | None
    dry_run: bool
    output: str | None


def run_sweep(
    step: Step,
    config: Path,
    asked: Asked,
    overrides: Sequence[str],
    profile: Profile | None,
    passthrough: Sequence[str],
    *,
    attached: bool,
) -> int:
    """Compile a sweep and show or submit it; the exit code of the command, with `attached` that of the points."""
    points = read_points(asked.axes, pairs=asked.pairs)
    sweep = compile_sweep(
        step,
        config,
        points,
        overrides,
        profile,
        passthrough,
        max_parallel=asked.max_parallel,
        run_id=asked.run_id,
        submits=not asked.dry_run,
        attached=attached,
    )
    if asked.dry_run:
        from nemotron_launch.cli.sweep_view import show

        show(sweep, asked.output)
        return 0
    raise UserError("this version compiles sweeps and does not submit them", hint="-d shows the array job")
