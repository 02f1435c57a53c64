"""Sequences cut and padded into the tensors of one forward pass.

Legend: B prompts, K tails of each, N = B·K sequences, P prompt tokens (padded), R tail tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Sequences that share their first `prompt_len` tokens.

    ids: one array of token ids per sequence, prompt included. loss_masks: None trains on everything behind the
    prompt; else one 0/1 array per sequence (as long as ids). valid: False excludes the group from every norm.
    """

    prompt_len: int
    ids: tuple[np.ndarray, ...]
    valid: bool = True
    loss_masks: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the rows [prompt | tail 1 | … | tail K] and which tail tokens count.

    tokens_BS: ids, S = P + K·R. positions_BS: place of each token in its own sequence. prompt_lens_B. tails_NR and
    mask_NR: the scored tokens and their 0/1 weights, fp32; R tokens of tail n are predicted one place earlier, the
    first by the prompt's last token. valid_G: 0 for groups (pairs, say) that are counted nowhere.
    """

    prompt: int
    tails: int
    tail: int
    tokens_BS: Tensor
    positions_BS: Tensor
    prompt_lens_B: Tensor
    tails_NR: Tensor
    mask_NR: Tensor
    valid_G: Tensor
    longest: int
    padded_prompts: bool

    @property
    def rows(self) -> int:
        return self.tokens_BS.shape[0]


def collate(
    groups: Sequence[Group], *, pad_id: int, device: torch.device, share_prompt: bool = True, multiple_of: int = 1
) -> Batch:
    """Pad groups of equally many sequences into one Batch.

    share_prompt: run each prompt once for all its sequences; otherwise every sequence is a row of its own.
    multiple_of: make S a multiple (sequence parallelism needs the tensor-parallel size).
    """
    count = len(groups[0].ids)
    share = share_prompt and count > 1 and min(group.prompt_len for group in groups) > 0
    rows = len(groups) if share else len(groups) * count
    tails = count if share else 1
    starts = [group.prompt_len if share else 0 for group in groups]
    tail = max(len(ids) - start for group, start in zip(groups, starts, strict=True) for ids in group.ids)
    tail = max(tail, 1)
    prompt = max(starts)
    prompt += -(prompt + tails * tail) % multiple_of if share else 0
    tail += 0 if share else -tail % multiple_of
    width = prompt + tails * tail

    tokens = np.full((rows, width), pad_id, np.int64)
    positions = np.zeros((rows, width), np.int64)
    scored = np.full((rows * tails, tail), pad_id, np.int64)
    mask = np.zeros((rows * tails, tail), np.float32)
    lengths = np.zeros(rows, np.int64)
    for g, (group, start) in enumerate(zip(groups, starts, strict=True)):
        for k, ids in enumerate(group.ids):
            n = g * count + k
            row, offset = (g, prompt + k * tail) if share else (n, 0)
            own = np.asarray(ids[start:], np.int64)
            tokens[row, offset : offset + len(own)] = own
            positions[row, offset : offset + tail] = np.arange(start, start + tail)
            scored[n, : len(own)] = own
            if group.loss_masks is None:
                mask[n, max(group.prompt_len - start, 0) : len(own)] = 1
            else:
                mask[n, : len(own)] = group.loss_masks[k][start:]
            if share and k == 0:
                tokens[row, :start] = ids[:start]
                positions[row, :prompt] = np.arange(prompt)
                lengths[row] = start
    if not share:
        mask[:, 0] = 0  # nothing predicts a sequence's first token
    valid = np.array([group.valid for group in groups], np.float32)
    mask *= np.repeat(valid, count)[:, None]

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Batch(
        prompt=prompt,
        tails=tails,
        tail=tail,
        tokens_BS=on_device(tokens),
        positions_BS=on_device(positions),
        prompt_lens_B=on_device(lengths),
        tails_NR=on_device(scored),
        mask_NR=on_device(mask),
        valid_G=on_device(valid),
        longest=int(positions.max()),
        padded_prompts=bool(share and lengths.min() < prompt),
    )


def wanted_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where the logits are needed: flat places s·B + b whose output predicts a masked tail token, and those tokens.

    Returns (places_W, index_W): index_W points into the flattened [N·R] tails.
    """
    index_W = batch.mask_NR.flatten().nonzero().squeeze(1)
    n_W, r_W = index_W // batch.tail, index_W % batch.tail
    b_W, k_W = n_W // batch.tails, n_W % batch.tails
    before_W = batch.prompt + k_W * batch.tail + r_W - 1
    s_W = torch.where(r_W > 0, before_W, batch.prompt_lens_B[b_W] - 1)
    return s_W * batch.rows + b_W, index_W
