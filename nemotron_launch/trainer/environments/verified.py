"""An environment that verifies each answer by itself: a verifier's functions, and where they run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron_launch.trainer.environments import Rollout, Score
from nemotron_launch.trainer.environments.bad_rows import refuse_bad_rows
from nemotron_launch.trainer.environments.worker import said
from nemotron_launch.trainer.environments.workers import Call, WorkerPool

Row = Mapping[str, Any]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Verifier:
    """What verifies one answer.

    problem: why a row cannot be verified, empty if it can. quick: the score, where it is found at once in this
    process; None where a worker has to find it. slow: `module:function` of (text, row, options), called in a worker
    for what quick leaves open. Scores are functions of text, row and options alone. options: beside the section's.
    """

    problem: Callable[[Row], str]
    quick: Callable[[str, Row, Options], Score | None] | None = None
    slow: str = ""
    options: Options = field(default_factory=dict)


class Verified:
    """Scores every answer by itself, in this process or in workers."""

    def __init__(self, verifier: Verifier, pool: WorkerPool | None, options: Options) -> None:
        self._verifier = verifier
        self._pool = pool
        self._options = options

    def problem(self, row: Row) -> str:
        """Why a row cannot be scored; empty if it can."""
        return self._verifier.problem(row)

    def check(self, rows: Sequence[Row], wheres: Sequence[str]) -> None:
        """Raise UserError for rows that cannot be scored."""
        refuse_bad_rows([self.problem(row) for row in rows], wheres)

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """The scores. An answer whose verification throws, or takes too long, is worth 0 and has an error."""
        rollouts = [rollout for group in groups for rollout in group]
        found = [self._at_once(rollout) for rollout in rollouts]
        open_ones = [i for i, score in enumerate(found) if score is None]
        if open_ones and self._pool is not None:
            calls = [Call(self._verifier.slow, (rollouts[i].text, rollouts[i].row, self._options)) for i in open_ones]
            for i, answer in zip(open_ones, self._pool.run(calls), strict=True):
                score = Score(0.0, error=answer.error) if answer.error else checked(answer.value)
                found[i] = replace(score, seconds=answer.seconds)
        scores = iter(found)
        return [[next(scores) or Score(0.0) for _ in group] for group in groups]

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()

    def _at_once(self, rollout: Rollout) -> Score | None:
        if self._verifier.quick is None:
            return None
        started = time.perf_counter()
        try:
            score = self._verifier.quick(rollout.text, rollout.row, self._options)
        except Exception as error:  # whatever a row holds, the run goes on
            score = Score(0.0, error=said(error))
        return score and replace(score, seconds=time.perf_counter() - started)


def checked(score: Score) -> Score:
    """The score, or an error where its reward is no finite number."""
    if not math.isfinite(score.reward) or not all(map(math.isfinite, score.components.values())):
        return Score(0.0, error=f"the reward is {score.reward}")
    return score
