"""What must hold between a job's parts before it is rendered: sizes, mounts, artifacts, time, the target's limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_launch.catalog import Step
from nemotron_launch.config.compose import Composed
from nemotron_launch.job import Job

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile


def check(job: Job, step: Step, composed: Composed, profile: Profile | None) -> None:
    """Raise the first thing that cannot work."""
