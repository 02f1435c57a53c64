"""What GRPO logs of a step, under NeMo-RL's names: of the loss, token by token, and of the rollouts, once a step.

The first kind adds up over micro-batches and ranks (names in _min and _max are extremes), because it is divided by the
global batch's counts; the second is taken of the whole step's rollouts, which every rank knows.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_launch.trainer.advantages import group_rows
from nemotron_launch.trainer.losses import EPSILON, token_kl


@dataclass(frozen=True)
class Means:
    """Means over the global batch, of which this micro-batch gives its part, in fp64.

    tokens_BS and sample_mask_B: 0/1, what counts; valid_tokens and valid_sequences: how much counts in the whole batch.
    """

    tokens_BS: Tensor
    sample_mask_B: Tensor
    valid_tokens: Tensor
    valid_sequences: Tensor

    def tokens(self, values_BS: Tensor) -> Tensor:
        """Every token weighs the same."""
        counted_BS = self.tokens_BS * self.sample_mask_B[:, None]
        return (values_BS * counted_BS).sum(dtype=torch.float64) / (self.valid_tokens + EPSILON)

    def sequences(self, values_BS: Tensor) -> Tensor:
        """Every sequence weighs the same, and in it every token."""
        sums_B = (values_BS * self.tokens_BS).sum(-1, dtype=torch.float64)
        means_B = sums_B / self.tokens_BS.sum(-1).clamp(min=1)
        return (means_B * self.sample_mask_B).sum() / (self.valid_sequences + EPSILON)

    def each_sequence(self, values_BS: Tensor) -> Tensor:
        """Mean over sequences of what is the same on all tokens of one."""
        first_B = values_BS[:, 0] * self.sample_mask_B
        return first_B.sum(dtype=torch.float64) / (self.valid_sequences + EPSILON)


def ratio_metrics(
    ratios_BS: Tensor, clipped_BS: Tensor, advantages_BS: Tensor, means: Means, *, cispo: bool
) -> dict[str, Tensor]:
    """Probability ratios of the policy to itself before the step, and how often clipping stops the gradient.

    A ratio that is too high stops where the advantage is positive, one too low where it is negative; with cispo any.
    """
    low_BS, high_BS = ratios_BS < clipped_BS, ratios_BS > clipped_BS
    if not cispo:
        low_BS, high_BS = low_BS & (advantages_BS < 0), high_BS & (advantages_BS > 0)
    found = {
        "probs_ratio": means.tokens(ratios_BS),
        "probs_ratio_clamped": means.tokens(clipped_BS),
        "clip_low_share": means.tokens(low_BS),
        "clip_high_share": means.tokens(high_BS),
    }
    counted_BS = (means.tokens_BS * means.sample_mask_B[:, None]) > 0
    for name, values_BS in (("probs_ratio", ratios_BS), ("probs_ratio_clamped", clipped_BS)):
        found[f"{name}_min"] = values_BS.masked_fill(~counted_BS, math.inf).min()
        found[f"{name}_max"] = values_BS.masked_fill(~counted_BS, -math.inf).max()
    return found


def engine_metrics(prev_BS: Tensor, gen_BS: Tensor, means: Means, *, kind: str) -> dict[str, Tensor]:
    """How far the generator's log-probabilities (gen) are from the trainer's (prev) for the same weights.

    token_mult_prob_error: mean of exp|gen - prev|, 1 where they agree. gen_kl_error is KL(generator ‖ policy),
    policy_kl_error KL(policy ‖ generator), js_divergence_error their Jensen-Shannon divergence by k3, all in nats.
    """
    mixture_BS = torch.logaddexp(prev_BS, gen_BS) - math.log(2)
    both_BS = (token_kl(mixture_BS, prev_BS) + token_kl(mixture_BS, gen_BS)) / 2
    return {
        "token_mult_prob_error": means.tokens((gen_BS - prev_BS).abs().exp()),
        "gen_kl_error": means.tokens(token_kl(gen_BS, prev_BS, kind=kind)),
        "policy_kl_error": means.tokens(token_kl(prev_BS, gen_BS, kind=kind)),
        "js_divergence_error": means.tokens(both_BS),
    }


def sequence_errors(prev_logps_BS: Tensor, gen_logps_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean of exp|gen - prev| over each sequence's masked tokens, [B], fp64; 1 where the engines agree."""
    difference_BS = (gen_logps_BS - prev_logps_BS).masked_fill(mask_BS == 0, 0.0).double()
    return (difference_BS.abs().exp() * mask_BS).sum(-1) / mask_BS.sum(-1).clamp(min=1)


def sequence_error_metrics(errors_B: Tensor, before_B: Tensor, after_B: Tensor, rewards_B: Tensor) -> dict[str, float]:
    """What seq_logprob_error_threshold did: errors before and after, and what was left out.

    before_B and after_B: the 0/1 sample masks without and with it. masked_correct_pct: share of the sequences left out
    whose reward was 1.
    """
    out_B = (before_B > 0) & (after_B == 0)
    found = {"num_masked_seqs_by_logprob_error": float(out_B.sum())}
    right = (rewards_B[out_B] == 1).double()
    found["masked_correct_pct"] = float(right.mean()) if len(right) else 0.0
    for name, mask_B in (("", before_B), ("_after_mask", after_B)):
        kept = errors_B[mask_B > 0].double()
        for kind, value in (("max", kept.max), ("mean", kept.mean), ("min", kept.min)):
            found[f"{kind}_seq_mult_prob_error{name}"] = float(value()) if len(kept) else math.nan
    return found


def reward_metrics(rewards_B: Tensor, groups_B: Tensor) -> dict[str, float]:
    """Mean, extremes and spread of rewards: of all, within groups and between groups.

    reward_std_within_groups is the square root of the mean unbiased variance of groups of at least two,
    reward_std_between_groups the unbiased standard deviation of the groups' means. groups_without_variance: share of
    groups whose rewards are all equal, from which nothing is learnt; all_best_groups and all_worst_groups: share of
    groups in which each reward is the batch's greatest, or least.
    """
    rewards_B = rewards_B.double()
    values_PG, there_PG, _ = group_rows(rewards_B, groups_B)
    sizes_P = there_PG.sum(-1)
    means_P = values_PG.sum(-1) / sizes_P
    squares_P = ((values_PG - means_P[:, None]) * there_PG).square().sum(-1)
    several_P = sizes_P > 1
    low_P = values_PG.masked_fill(~there_PG, math.inf).amin(-1)
    high_P = values_PG.masked_fill(~there_PG, -math.inf).amax(-1)
    within = (squares_P[several_P] / (sizes_P[several_P] - 1)).mean().sqrt() if several_P.any() else torch.zeros(())
    least, greatest = rewards_B.min(), rewards_B.max()
    differ = bool(greatest > least)
    return {
        "reward": float(rewards_B.mean()),
        "reward_min": float(least),
        "reward_max": float(greatest),
        "reward_std": _std(rewards_B),
        "reward_std_within_groups": float(within),
        "reward_std_between_groups": _std(means_P),
        "groups_without_variance": float((low_P == high_P).double().mean()),
        "all_best_groups": float((low_P == greatest).double().mean()) if differ else 0.0,
        "all_worst_groups": float((high_P == least).double().mean()) if differ else 0.0,
    }


def _std(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def length_metrics(lengths_B: Tensor, prompt_lengths_B: Tensor, truncated_B: Tensor) -> dict[str, float]:
    """Tokens of answers (with their stop token) and prompts; truncated: cut at the limit, without a stop token."""
    lengths_B, prompt_lengths_B = lengths_B.double(), prompt_lengths_B.double()
    return {
        "mean_prompt_length": float(prompt_lengths_B.mean()),
        "mean_gen_tokens_per_sample": float(lengths_B.mean()),
        "max_gen_tokens_per_sample": float(lengths_B.max()),
        "total_num_tokens": float(lengths_B.sum() + prompt_lengths_B.sum()),
        "truncation_rate": float(truncated_B.double().mean()),
    }


def advantage_metrics(advantages_B: Tensor, lengths_B: Tensor, sample_mask_B: Tensor) -> dict[str, float]:
    """Mean over the tokens that count, least and greatest advantage; 0 where nothing counts."""
    kept = sample_mask_B > 0
    values, weights = advantages_B[kept].double(), lengths_B[kept].double()
    if not len(values):
        return {"advantages/mean": 0.0, "advantages/min": 0.0, "advantages/max": 0.0}
    return {
        "advantages/mean": float((values * weights).sum() / weights.sum().clamp(min=1)),
        "advantages/min": float(values.min()),
        "advantages/max": float(values.max()),
    }
