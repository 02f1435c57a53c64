"""What held-out prompts say of a policy: accuracy of sampled and of greedy answers, pass@k, lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemotron_launch.trainer.data.prompts import Prompt
from nemotron_launch.trainer.grpo_rollouts import Roller, Rollouts, score_metrics
from nemotron_launch.trainer.grpo_samples import SampleLog, best_and_worst, say
from nemotron_launch.trainer.rollouts import Sampling

# Training steps count from 1. All validations draw the same random numbers: what differs between them is the policy.
VALIDATION_STEP = 0
PREFIX = "validation/"


@dataclass(frozen=True)
class Validation:
    """How to validate. samples: answers to each prompt; batch: prompts at once; shown: answers put in train.log."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    samples: int
    batch: int
    greedy: bool
    shown: int

    @staticmethod
    def of(config: Mapping[str, Any], prompts: Sequence[Prompt], sampling: Sampling) -> Validation | None:
        """As `grpo` says, on its first prompts; None where there are none."""
        if not prompts:
            return None
        grpo, generation = config["grpo"], config["policy"]["generation"]
        chosen = prompts[: grpo["max_val_samples"] or len(prompts)]
        return Validation(
            prompts=chosen,
            sampling=replace(
                sampling,
                temperature=generation["val_temperature"],
                top_p=generation["val_top_p"],
                top_k=generation["val_top_k"] or 0,
            ),
            samples=grpo["val_num_generations_per_prompt"],
            batch=grpo["val_batch_size"] or len(chosen),
            greedy=grpo["val_greedy"] and generation["val_temperature"] > 0 and not _compared(config, chosen),
            shown=config["logger"]["num_val_samples_to_print"],
        )

    def run(self, roller: Roller, step: int, samples: SampleLog) -> dict[str, float]:
        """Metrics by full name; the answers to read go to `samples`."""
        began = time.monotonic()
        sampled = self._rolled(roller, self.samples, self.sampling)
        line = validation_metrics(sampled, self.samples)
        if self.greedy:
            greedy = self._rolled(roller, 1, replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0))
            line["greedy_accuracy"] = mean_reward(greedy)
        if sampled.texts:
            first = [i * self.samples for i in range(min(self.shown, len(self.prompts)))]
            say(sampled, first)
            samples.write(step, "validation", sampled, list(dict.fromkeys([*first, *best_and_worst(sampled)])))
        found = {f"{PREFIX}{name}": value for name, value in line.items()}
        return found | {"timing/validation/total_validation_time": time.monotonic() - began}

    def _rolled(self, roller: Roller, samples: int, sampling: Sampling) -> Rollouts:
        whole: Rollouts | None = None
        for start in range(0, len(self.prompts), self.batch):
            part = self.prompts[start : start + self.batch]
            keys = range(start, start + len(part))
            done = roller.roll(part, keys, step=VALIDATION_STEP, samples=samples, sampling=sampling)
            whole = done if whole is None else whole.plus(done)
        assert whole is not None
        return whole


def _compared(config: Mapping[str, Any], prompts: Sequence[Prompt]) -> bool:
    """Whether answers are judged in pairs: a single one has none to be compared with."""
    judged = any(prompt.row.get("env_name") == "judge" for prompt in prompts)
    return judged and config["env"]["judge"]["mode"] == "pairwise"


def validation_metrics(rollouts: Rollouts, samples: int) -> dict[str, float]:
    """accuracy (mean reward), pass_at_j of `samples` answers, lengths, truncation, what the verifier said.

    pass_at_j is the chance that of j answers one is right, reward 1 or more, for j = 1, 2, 4 … and all (pass_k, as
    NeMo-RL calls it).
    """
    line = {
        "accuracy": mean_reward(rollouts),
        "reward_std": float(rollouts.rewards_B[rollouts.known_B].std(correction=0)) if rollouts.known_B.any() else 0.0,
        "avg_length": float(rollouts.lengths_B.double().mean()),
        "truncation_rate": float(rollouts.truncated_B.double().mean()),
        "num_samples": float(len(rollouts)),
        **{name: value for name, value in score_metrics(rollouts).items() if name != "slowest_verification"},
    }
    if samples > 1:
        right_PG = (rollouts.rewards_B >= 1).view(-1, samples)
        for j in sorted({*(1 << i for i in range(samples.bit_length())), samples}):
            if j <= samples:
                line[f"pass_at_{j}"] = pass_at(right_PG, j)
        line["pass_k"] = line[f"pass_at_{samples}"]
    return line


def mean_reward(rollouts: Rollouts) -> float:
    """Of the rollouts that have a reward."""
    known_B = rollouts.known_B
    return float(rollouts.rewards_B[known_B].mean()) if known_B.any() else math.nan


def pass_at(right_PG: Tensor, j: int) -> float:
    """Chance that one of j answers drawn from the G is right, mean over prompts (Chen et al. 2021, eq. 1)."""
    size = right_PG.shape[1]
    wrong = (size - right_PG.sum(1)).tolist()
    return float(torch.tensor([1 - math.comb(int(n), j) / math.comb(size, j) for n in wrong]).double().mean())
