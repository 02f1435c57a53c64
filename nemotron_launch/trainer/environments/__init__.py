"""Environments: what scores rollouts. One small interface; which one scores a row, the row or the config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from nemotron_launch.trainer.environments.router import Environments


@dataclass(frozen=True)
class Rollout:
    """One sampled answer, as an environment sees it.

    messages: the prompt, [{role, content}, …]; text: the answer, decoded without its stop token; row: the dataset's row
    with its verifier fields; where: file:line of the row. truncated: cut at max_new_tokens. key: (seed, step, prompt,
    sample), the same in every layout and after a resume.
    """

    messages: Sequence[Mapping[str, Any]]
    text: str
    row: Mapping[str, Any]
    where: str = ""
    truncated: bool = False
    tokens: int = 0
    key: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """What a rollout is worth. error: why the verifier could not say (the reward is then 0, and it is counted).

    lost: no reward could be had (a server is gone): the sample is left out of the loss, up to a configured share.
    components: named parts of the reward, logged one by one. seconds: what scoring took.
    """

    reward: float
    error: str = ""
    lost: bool = False
    components: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Environment(Protocol):
    """Scores whole groups (all samples of a prompt), since a judge compares them. Same input, same scores."""

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
        """Raise UserError, before the first rollout, for rows that cannot be scored: file, line and field."""

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """A score for each rollout, in the same shape and order."""

    def close(self) -> None:
        """End workers and servers that were started."""


def open_environments(config: Mapping[str, Any], *, step_dir: Path | None = None, rank: int = 0) -> Environments:
    """All environments that a composed config's rows may choose; each starts when its first row comes.

    step_dir: what `step://` stands for; rank: tells the files of several processes apart. A context manager: workers
    and servers end with it.
    """
    from nemotron_launch.trainer.environments.router import Environments

    return Environments(config, step_dir=step_dir, rank=rank)
