"""What a step of GRPO says of itself: rewards, lengths, times; metrics of several optimizer steps as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemotron_launch.trainer.advantages import group_ids
from nemotron_launch.trainer.grpo_metrics import length_metrics, reward_metrics
from nemotron_launch.trainer.grpo_rollouts import Rollouts, score_metrics
from nemotron_launch.trainer.megatron.parallel import Layout
from nemotron_launch.trainer.memory import peak_memory

# Metrics that are counts: of several optimizer steps their sum.
COUNTS = ("num_valid_samples",)


def rewarded(rollouts: Rollouts) -> dict[str, float]:
    """Metrics of rewards as they were scored, those that dynamic sampling leaves out included."""
    known = rollouts.take(torch.nonzero(rollouts.known_B).flatten().tolist())
    found = reward_metrics(known.rewards_B, group_ids([prompt.ids for prompt in known.prompts])) if len(known) else {}
    return found | score_metrics(rollouts) | {"sampled_tokens": float(rollouts.lengths_B.sum())}


def described(rollouts: Rollouts, shaped_B: Tensor, sample_mask_B: Tensor) -> dict[str, float]:
    """Metrics of the rollouts that are trained on. shaped_B: their rewards, scaled and shaped."""
    known_B, lengths_B = rollouts.known_B, rollouts.lengths_B
    return {
        **length_metrics(lengths_B, rollouts.prompt_lengths_B, rollouts.truncated_B),
        "filtered_reward": float(rollouts.rewards_B[known_B].mean()) if known_B.any() else math.nan,
        "shaped_reward": float(shaped_B[known_B].mean()) if known_B.any() else math.nan,
        "global_valid_seqs": float(sample_mask_B.sum()),
        "global_valid_toks": float((lengths_B * sample_mask_B).sum()),
        "avg_turns_per_sample": 1.0,
    }


def timing(
    seconds: Mapping[str, float], *, tokens: float, sampled: float, valid: float, layout: Layout
) -> dict[str, float]:
    """Seconds by what took them, tokens a second, and memory.

    tokens: prompts and answers that are trained on; sampled: answers, also those left out; valid: those in the loss.
    """
    processes, total = layout.data * layout.tensor * layout.pipeline, seconds["total_step_time"]
    return {f"timing/train/{name}": value for name, value in seconds.items()} | {
        "timing/train/tokens_per_sec": tokens / total,
        "timing/train/generation_tokens_per_sec": sampled / max(seconds["generation"], 1e-9),
        "timing/train/valid_tokens_per_sec_per_gpu": valid / total / processes,
        **peak_memory(layout.device),
    }


def together(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one: means, extremes, sums of counts."""

    def one(name: str, values: list[float]) -> float:
        if name in COUNTS:
            return sum(values)
        if name.endswith(("_min", "_max")):
            return min(values) if name.endswith("_min") else max(values)
        return sum(values) / len(values)

    return {name: one(name, [result[name] for result in results]) for name in results[0]}
