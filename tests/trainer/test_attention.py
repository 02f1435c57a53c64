"""Attention over shared prompts against one plain sequence at a time, in double precision, with its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nemotron_launch.trainer.batch import Group, collate
from nemotron_launch.trainer.megatron import attention
from nemotron_launch.trainer.megatron.attention import PLANS, AttentionPlan, PlannedAttention, RotaryTable
from nemotron_launch.trainer.megatron.explicit_attention import ExplicitAttention, explicit_scores

HEADS, GROUPS, DIM = 4, 2, 8
# prompt lengths, tails of each prompt, tail tokens
ROWS = {
    "pairs": ((5, 5), 2, 4),
    "padded-prompts": ((3, 7, 1), 2, 4),
    "one-token-prompts": ((1, 1), 2, 3),
    "one-token-tails": ((4, 2), 3, 1),
    "one-pair": ((6,), 2, 5),
    "many-tails": ((2, 5), 5, 3),
    "no-prompt": ((0, 0), 1, 9),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(name: str, *, dtype: torch.dtype = torch.float64) -> tuple[AttentionPlan, list[torch.Tensor], tuple[int, ...]]:
    """The plan of such rows, query, key and value for them, and the prompts' lengths."""
    lengths, tails, tail = ROWS[name]
    groups = [Group(n, tuple(np.arange(n + tail) for _ in range(tails))) for n in lengths]
    batch = collate(groups, pad_id=0, device=torch.device("cpu"))
    table = RotaryTable(
        head_dim=DIM, theta=100.0, scaling=None, max_positions=64, device=torch.device("cpu"), dtype=dtype
    )
    cos, sin = table.at(batch.positions_BS.T, batch.longest)
    mask = None
    if batch.padded_prompts:
        mask = torch.arange(batch.prompt) >= batch.prompt_lens_B[:, None]
    plan = AttentionPlan(batch.prompt, batch.tails, batch.tail, cos, sin, mask)
    rows, width = batch.tokens_BS.shape
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(width, rows, n, DIM, dtype=dtype, generator=generator).requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    ]
    return plan, tensors, lengths


def core_attention() -> PlannedAttention:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    return PlannedAttention(config, layer_number=1)


def turned(x_Shd: torch.Tensor) -> torch.Tensor:
    """Rotary positions as the paper writes them: a rotation of each pair of dimensions (i, i + d/2)."""
    out = torch.empty_like(x_Shd)
    for place in range(len(x_Shd)):
        for i in range(DIM // 2):
            angle = place * 100.0 ** (-2 * i / DIM)
            low, high = x_Shd[place, :, i], x_Shd[place, :, i + DIM // 2]
            out[place, :, i] = low * math.cos(angle) - high * math.sin(angle)
            out[place, :, i + DIM // 2] = high * math.cos(angle) + low * math.sin(angle)
    return out


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence, [S, h, d]."""
    q, k = turned(query), turned(key).repeat_interleave(HEADS // GROUPS, 1)
    v = value.repeat_interleave(HEADS // GROUPS, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(DIM)
    hidden = torch.ones(len(q), len(q)).triu(1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def expected(plan: AttentionPlan, tensors: list[torch.Tensor], lengths: tuple[int, ...]) -> torch.Tensor:
    """Row by row, sequence by sequence; places of padding stay 0."""
    query = tensors[0]
    out = [[torch.zeros(HEADS * DIM, dtype=query.dtype) for _ in lengths] for _ in range(len(query))]
    for row, length in enumerate(lengths):
        for k in range(plan.tails):
            start = plan.prompt + k * plan.tail
            places = [*range(length), *range(start, start + plan.tail)]
            attended = plain(*(x[places, row] for x in tensors))
            for place, value in zip(places, attended, strict=True):
                out[place][row] = value.flatten()
    return torch.stack([torch.stack(row) for row in out])


def real(plan: AttentionPlan, lengths: tuple[int, ...]) -> torch.Tensor:
    """1 where a token stands, 0 on padding of a prompt, [S, B, 1]."""
    places = torch.arange(plan.prompt + plan.tails * plan.tail)[:, None]
    return ((places >= plan.prompt) | (places < torch.tensor(lengths))).double().unsqueeze(2)


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "fused"])
@pytest.mark.parametrize("name", ROWS)
def test_tails_attend_as_separate_sequences_would(name, explicit, monkeypatch):
    if not explicit:
        monkeypatch.setattr(attention, "MAX_EXPLICIT_SCORES", 0)
    plan, tensors, lengths = made(name)
    weights = torch.randn(tensors[0].shape[0], len(lengths), HEADS * DIM, dtype=torch.float64) * real(plan, lengths)
    ticket = PLANS.register(plan)
    out = core_attention()(*tensors, ticket)
    want = expected(plan, tensors, lengths)
    near = {"atol": 2e-6, "rtol": 1e-6}  # the table's angles are fp32
    torch.testing.assert_close(out * real(plan, lengths), want, **near)
    got_grads = torch.autograd.grad((out * weights).sum(), tensors)
    want_grads = torch.autograd.grad((want * weights).sum(), tensors)
    for got, grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, grad, **near)
    PLANS.clear()


@pytest.mark.parametrize("name", ["padded-prompts", "no-prompt"])
def test_the_hand_written_gradient_is_the_derivative(name):
    plan, tensors, _ = made(name)
    assert torch.autograd.gradcheck(lambda q, k, v: ExplicitAttention.apply(q, k, v, plan, 0.3), tensors)


def test_a_layer_that_keeps_wanted_tokens_gives_those_and_their_gradient():
    plan, tensors, _ = made("padded-prompts")
    plan.wanted_W = torch.tensor([5, 2, 2, 17])  # a token wanted twice is the last of a prompt with two answers
    ticket = PLANS.register(plan)
    layer = core_attention()
    whole = layer(*tensors, ticket).flatten(0, 1)[plan.wanted_W]
    layer.keeps_wanted_only = True
    kept = layer(*tensors, ticket)
    assert torch.equal(kept.squeeze(1), whole)
    for got, grad in zip(
        torch.autograd.grad(kept.square().sum(), tensors),
        torch.autograd.grad(whole.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, grad)
    PLANS.clear()


def test_explicit_attention_is_chosen_by_the_scores_that_it_would_hold():
    plan, _, _ = made("pairs")
    # 2 rows of 4 heads: 5 × 5 for the prompt, 2 tails of 4 × (5 + 4)
    assert explicit_scores(plan, 2, HEADS) == 2 * 4 * (25 + 2 * 36)
