"""How many rollouts may stay without a reward: a server that is gone costs its rows, not the run, up to a share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import Score


def refuse_lost(scores: Iterable[Score], allowed: float) -> None:
    """Raise UserError if more than a share `allowed` (env.max_failed_rollouts) of a whole step's scores is lost."""
    scores = list(scores)
    lost = [score for score in scores if score.lost]
    if len(lost) <= allowed * len(scores):
        return
    reasons = Counter(score.error for score in lost).most_common(3)
    raise UserError(
        f"{len(lost)} of {len(scores)} rollouts have no reward, where {100 * allowed:.3g}% may be without",
        where="env.max_failed_rollouts",
        hint="\n".join([*(f"{count} × {reason}" for reason, count in reasons), "see the log of what scores them"]),
        exit_code=1,
    )
