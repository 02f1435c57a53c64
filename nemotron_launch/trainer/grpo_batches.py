"""Rollouts cut into micro-batches in which a prompt is computed once for its answers, and numbers put beside tokens.

Legend: B rollouts, K answers that share a prompt in a row of the batch, N answers of a micro-batch, R tokens of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.trainer.batch import Batch, Group, collate
from nemotron_launch.trainer.grpo_rollouts import Rollouts
from nemotron_launch.trainer.megatron.parallel import Layout


@dataclass(frozen=True)
class Packing:
    """How answers become rows. samples: of each prompt; multiple_of: tokens of a row are padded to a multiple of it."""

    samples: int
    pad_id: int
    share_prompt: bool
    multiple_of: int


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts computed together. places: which ones of the step's, [N], in the order of the batch's answers."""

    places: np.ndarray
    batch: Batch

    def beside(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each answer's tokens, one tensor an answer, as the batch has the answers: [N, R], 0 elsewhere."""
        placed_NR = torch.zeros_like(self.batch.mask_NR)
        placed_NR[self.batch.mask_NR > 0] = torch.cat(list(values)).to(placed_NR)
        return placed_NR

    def apart(self, values_NR: Tensor) -> list[Tensor]:
        """The way back: one tensor an answer."""
        mask_NR = self.batch.mask_NR > 0
        return list(values_NR[mask_NR].split(mask_NR.sum(-1).tolist()))


def own_share(places: np.ndarray, layout: Layout) -> np.ndarray:
    """The rollouts of an optimizer step that this data-parallel rank trains on."""
    return np.array_split(places, layout.data)[layout.data_rank]


def micro_batches(
    rollouts: Rollouts,
    places: np.ndarray,
    size: int,
    packing: Packing,
    device: torch.device,
    *,
    tokens: int | None = None,
) -> list[MicroBatch]:
    """Micro-batches of `size` rollouts (the last one may have fewer) of `places`, which keep prompts together.

    A prompt is computed once for as many of its answers as lie together and fit. Answers of similar length share a
    micro-batch, the longest come first: what memory is needed shows at once, and little of it is padding. tokens: take
    as many rollouts as make at most so many tokens, padding and all, instead of `size`; one at least.
    """
    together = math.gcd(packing.samples, len(places)) if tokens else math.gcd(size, packing.samples, len(places))
    while tokens and together > 1 and max(_tokens(rollouts, row) for row in places.reshape(-1, together)) > tokens:
        together = max(part for part in range(1, together) if together % part == 0)
    groups = sorted(places.reshape(-1, together), key=lambda group: -_tokens(rollouts, group))
    made = []
    while groups:
        count = max((tokens // _tokens(rollouts, groups[0])) if tokens else size // together, 1)
        chosen, groups = groups[:count], groups[count:]
        batch = collate(
            [_group(rollouts, group) for group in chosen],
            pad_id=packing.pad_id,
            device=device,
            share_prompt=packing.share_prompt,
            multiple_of=packing.multiple_of,
        )
        made.append(MicroBatch(np.concatenate(chosen), batch))
    return made


def _tokens(rollouts: Rollouts, group: np.ndarray) -> int:
    """Tokens of a group's row in a batch."""
    longest = max(len(rollouts.completions[i].ids) for i in group)
    return len(rollouts.prompts[group[0]].ids) + len(group) * longest


def _group(rollouts: Rollouts, group: np.ndarray) -> Group:
    prompt = rollouts.prompts[group[0]].ids
    answers = (np.asarray(rollouts.completions[i].ids, prompt.dtype) for i in group)
    return Group(len(prompt), tuple(np.concatenate([prompt, answer]) for answer in answers))
