"""The environment reward_model: a Hugging Face model that was trained on preferences scores each answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.data.messages import TemplateBreaksPrefix
from nemotron_launch.trainer.data.sources import BadRow
from nemotron_launch.trainer.environments import Rollout, Score
from nemotron_launch.trainer.reward_models import RewardModel

KEY = "env.reward_model"


class RewardModelEnvironment:
    """Scores by a reward model in this process; section: `env.reward_model`."""

    name = "reward_model"

    def __init__(self, section: Mapping[str, Any], *, step_dir: Path | None) -> None:
        self.batch_size = section["batch_size"]
        self.model = RewardModel.load(section, step_dir=step_dir, where=KEY, device=section["device"])

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
        """Nothing is needed of a row but its prompt."""

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """The model's score of each whole conversation. One that its chat template refuses is an error, and worth 0."""
        began = time.monotonic()
        rollouts = [rollout for group in groups for rollout in group]
        sequences: dict[int, np.ndarray] = {}
        refused: dict[int, str] = {}
        for i, rollout in enumerate(rollouts):
            try:
                sequences[i] = self.model.ids([dict(message) for message in rollout.messages], rollout.text)
            except (BadRow, TemplateBreaksPrefix) as problem:
                refused[i] = str(problem)
        if rollouts and not sequences:
            hint = f"the first: {refused[0]}\nset {KEY}.tokenizer.chat_template"
            raise UserError("the reward model's chat template takes none of the conversations", where=KEY, hint=hint)
        values = dict(
            zip(sequences, self.model.score(list(sequences.values()), batch_size=self.batch_size), strict=True)
        )
        seconds = (time.monotonic() - began) / max(len(rollouts), 1)
        scores = (Score(values.get(i, 0.0), error=refused.get(i, ""), seconds=seconds) for i in range(len(rollouts)))
        return [[next(scores) for _ in group] for group in groups]

    def close(self) -> None:
        """Nothing was started."""
