"""From rewards to advantages: scaling, shaping, baselines, dynamic sampling, filters. Pure functions of tensors.

In the order in which a step calls them: scale_rewards → shape_rewards → group_statistics → varied → advantages →
set_advantages → clip_advantages; not_truncated and the sequence error mask decide who counts in the loss, but all
samples vote in their group's baseline.

Legend: B sequences of the whole step in any order, P groups, G samples of the largest group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# What NeMo-RL adds to a standard deviation before dividing by it.
EPSILON = 1e-6


def group_ids(prompts: Sequence[np.ndarray]) -> Tensor:
    """The group of each prompt, [B]: identical token ids are one group, numbered as they first come."""
    known: dict[bytes, int] = {}
    return torch.tensor([known.setdefault(np.asarray(ids, np.int64).tobytes(), len(known)) for ids in prompts])


@dataclass(frozen=True)
class RewardScaling:
    """Rewards cut to [source_min, source_max] and mapped linearly to [target_min, target_max]."""

    source_min: float = 0.0
    source_max: float = 1.0
    target_min: float = 0.0
    target_max: float = 1.0


def scale_rewards(rewards_B: Tensor, scaling: RewardScaling) -> Tensor:
    """Cut and map rewards."""
    inside_B = rewards_B.clamp(scaling.source_min, scaling.source_max)
    share_B = (inside_B - scaling.source_min) / (scaling.source_max - scaling.source_min)
    return scaling.target_min + share_B * (scaling.target_max - scaling.target_min)


@dataclass(frozen=True)
class RewardShaping:
    """What long answers cost: DAPO's growing penalty, or with stop_properly_penalty_coef a factor in place of it."""

    max_response_length: int
    overlong_buffer_length: int = 128
    overlong_buffer_penalty: float = 1.0
    stop_properly_penalty_coef: float | None = None


def shape_rewards(rewards_B: Tensor, lengths_B: Tensor, truncated_B: Tensor, shaping: RewardShaping) -> Tensor:
    """Rewards less the penalty for long answers (DAPO, Yu et al. 2025, eq. 13, without its lower bound, as NeMo-RL).

    lengths_B: tokens of the answers. From max_response_length - overlong_buffer_length on the penalty grows by
    overlong_buffer_penalty for each overlong_buffer_length tokens. With stop_properly_penalty_coef truncated answers
    keep that share of their reward instead.
    """
    if shaping.stop_properly_penalty_coef is not None:
        return torch.where(truncated_B.bool(), rewards_B * shaping.stop_properly_penalty_coef, rewards_B)
    expected = shaping.max_response_length - shaping.overlong_buffer_length
    over_B = (lengths_B - expected).clamp(min=0).to(rewards_B) / shaping.overlong_buffer_length
    return rewards_B - over_B * shaping.overlong_buffer_penalty


def group_rows(values_B: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Values as one row for each group, 0 where a group is smaller than the largest.

    Returns values_PG, there_PG (where a sample is), and the row and column of each of the B samples.
    """
    _, rows_B = groups_B.unique(return_inverse=True)
    order_B = rows_B.argsort(stable=True)
    sizes_P = rows_B.bincount()
    starts_P = sizes_P.cumsum(0) - sizes_P
    columns_B = torch.empty_like(rows_B)
    columns_B[order_B] = torch.arange(len(rows_B), device=rows_B.device) - starts_P[rows_B[order_B]]
    values_PG = values_B.new_zeros(len(sizes_P), int(sizes_P.max()))
    values_PG[rows_B, columns_B] = values_B
    there_PG = torch.arange(values_PG.shape[1], device=rows_B.device) < sizes_P[:, None]
    return values_PG, there_PG, (rows_B, columns_B)


def group_statistics(
    rewards_B: Tensor, groups_B: Tensor, *, leave_one_out: bool, votes_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each sample's baseline and unbiased standard deviation, [B] each, fp64.

    Of its whole group, or with leave_one_out (Ahmadian et al. 2024) of the others in it. votes_B: 0 for samples whose
    reward is not known; truncated samples vote. Without at least two that vote in the group the baseline is the
    reward itself; where fewer than two count or all are equal, the deviation is exactly 0, also where the mean of
    equal rewards rounds (NeMo-RL takes a difference of squares, whose rounding makes advantages of thousands there).
    """
    votes_B = torch.ones_like(groups_B, dtype=torch.bool) if votes_B is None else votes_B.bool()
    rewards_PG, there_PG, place = group_rows(rewards_B.double(), groups_B)
    votes_PG, _, _ = group_rows(votes_B, groups_B)
    size = rewards_PG.shape[1]
    seen_PGG = (votes_PG & there_PG)[:, None, :].expand(-1, size, -1)
    if leave_one_out:
        seen_PGG = seen_PGG & ~torch.eye(size, dtype=torch.bool, device=rewards_B.device)
    values_PGG = rewards_PG[:, None, :].expand_as(seen_PGG)
    counts_PG = seen_PGG.sum(-1)
    means_PG = (values_PGG * seen_PGG).sum(-1) / counts_PG.clamp(min=1)
    squares_PG = ((values_PGG - means_PG[..., None]) * seen_PGG).square().sum(-1)
    stds_PG = (squares_PG / (counts_PG - 1).clamp(min=1)).sqrt()
    low_PG = values_PGG.masked_fill(~seen_PGG, math.inf).amin(-1)
    high_PG = values_PGG.masked_fill(~seen_PGG, -math.inf).amax(-1)
    equal_PG = low_PG >= high_PG
    means_PG = torch.where(equal_PG & (counts_PG > 0), low_PG, means_PG)
    alone_P = votes_PG.sum(-1) < 2
    baselines_PG = torch.where(alone_P[:, None], rewards_PG, means_PG)
    stds_PG = stds_PG.masked_fill(equal_PG | alone_P[:, None], 0.0)
    return baselines_PG[place], stds_PG[place]


def advantages(rewards_B: Tensor, baselines_B: Tensor, stds_B: Tensor, *, normalize: bool) -> Tensor:
    """reward - baseline, divided by the standard deviation + 1e-6 where that is not 0, [B], fp32.

    Shao et al. 2024 (GRPO), section 4.1.2; a group without variance has advantages of 0, and a sample whose others
    are all equal keeps its undivided difference.
    """
    difference_B = rewards_B.double() - baselines_B
    if normalize:
        difference_B = torch.where(stds_B > 0, difference_B / (stds_B + EPSILON), difference_B)
    return difference_B.float()


def varied(stds_B: Tensor) -> Tensor:
    """Dynamic sampling's choice (DAPO, section 3.2), [B] bool: samples from whose group something is learnt.

    stds_B: of rewards before they are shaped by length, else a group would count as varied for its lengths alone.
    """
    return stds_B > 0


def not_truncated(truncated_B: Tensor) -> Tensor:
    """Overlong filtering's sample mask, [B] fp32: 0 for truncated answers; they still vote in their baseline."""
    return (~truncated_B.bool()).float()


def set_advantages(advantages_B: Tensor, flagged_B: Tensor, value: float | None) -> Tensor:
    """The value in place of the advantage of samples that are flagged (an invalid tool call, say); None: as it is."""
    return advantages_B if value is None else advantages_B.masked_fill(flagged_B.bool(), value)


def clip_advantages(advantages_B: Tensor, low: float | None, high: float | None) -> Tensor:
    """Advantages within [low, high]; None does not bound."""
    return advantages_B if low is None and high is None else advantages_B.clamp(low, high)
