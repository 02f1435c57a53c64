"""Log-probabilities and their gradients against torch's log_softmax. Two tensor-parallel ranks: test_layouts.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_launch.trainer.megatron.logprobs import keep_likeliest, lowest_kept, mask_padding, token_logps

N, V = 40, 97


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets, and the gradient that comes back to the log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(N, V, generator=generator)
    return logits, torch.randint(0, V, (N,), generator=generator), torch.randn(N, generator=generator)


def by_torch(logits: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """In double precision, by autograd."""
    logits = logits.double().requires_grad_()
    logps = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    logps.backward(grad.double())
    return logps.detach(), logits.grad


def ours(logits: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    logps = token_logps(logits, targets, first=0, group=None)
    logps.backward(grad)
    return logps.detach(), logits.grad


def test_log_probabilities_and_gradients_are_torchs(drawn):
    for got, expected in zip(ours(*drawn), by_torch(*drawn), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_do_not_overflow(drawn, shift):
    """exp(10,000) is infinite in every float; only differences matter. fp32 holds 10,000 to 0.0005."""
    logits, targets, grad = drawn
    for got, expected in zip(ours(logits + shift, targets, grad), by_torch(*drawn), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=5e-3, rtol=5e-3)


def test_bfloat16_logits_give_fp32_log_probabilities_and_bfloat16_gradients(drawn):
    logits, targets, grad = drawn
    half = logits.bfloat16()
    logps, gradient = ours(half, targets, grad)
    expected, expected_gradient = by_torch(half, targets, grad)
    assert (logps.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logps.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-4, rtol=2**-7)


def test_logits_are_left_as_they_were(drawn):
    logits, targets, grad = drawn
    before = logits.clone()
    ours(logits, targets, grad)
    assert torch.equal(logits, before)


def test_padding_takes_no_part(drawn):
    """Ten columns of padding, the greatest of all: as if they were not there, and their gradient is 0."""
    logits, targets, grad = drawn
    padded = torch.cat([logits, torch.full((N, 10), 100.0)], 1).requires_grad_()
    logps = token_logps(mask_padding(padded, first=0, vocab_size=V), targets, first=0, group=None)
    logps.backward(grad)
    expected, expected_gradient = ours(logits, targets, grad)
    torch.testing.assert_close(logps.detach(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(padded.grad[:, :V], expected_gradient, atol=1e-7, rtol=1e-5)
    assert not padded.grad[:, V:].any()


@pytest.mark.parametrize(
    ("first", "width", "masked"),
    [(0, 259, []), (0, 130, []), (130, 130, [129]), (258, 4, [1, 2, 3]), (260, 2, [0, 1]), (0, 300, range(259, 300))],
)
def test_columns_beyond_the_vocabulary_are_masked(first, width, masked):
    """Of 259 tokens; a rank's columns start at `first`."""
    got = mask_padding(torch.zeros(2, width), first=first, vocab_size=259)
    assert got.isinf().any(0).nonzero().flatten().tolist() == list(masked)
    assert got[:, [i for i in range(width) if i not in masked]].eq(0).all()


# -- top-p and top-k -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters", [{"top_p": 1.0, "top_k": 7}, {"top_p": 0.6, "top_k": 0}, {"top_p": 0.8, "top_k": 30}]
)
def test_filtered_log_probabilities_and_gradients_are_those_of_a_softmax_over_the_kept(drawn, filters):
    """A target that would not be kept is scored as if it were: its log-probability is finite, and can be raised."""
    logits, targets, grad = drawn
    targets = targets.clone()
    targets[::2] = logits[::2].argmax(-1)
    kept = torch.zeros(N, V, dtype=torch.bool)
    for row in range(N):
        reached, weights = 0.0, torch.softmax(logits[row].double(), 0)
        order = logits[row].argsort(descending=True)[: filters["top_k"] or V].tolist()
        total = float(weights[order].sum())
        for token in order:
            if reached < filters["top_p"] * total:
                kept[row, token] = True
            reached += float(weights[token])
    outside = ~kept.gather(1, targets[:, None])
    assert 5 < int(outside.sum()) <= N // 2
    kept.scatter_(1, targets[:, None], True)

    masked = logits.double().requires_grad_()
    expected = torch.log_softmax(masked.masked_fill(~kept, -torch.inf), -1).gather(1, targets[:, None])[:, 0]
    expected.backward(grad.double())
    own = logits.clone().requires_grad_()
    got = token_logps(keep_likeliest(own, targets, first=0, group=None, **filters), targets, first=0, group=None)
    got.backward(grad)
    torch.testing.assert_close(got.detach().double(), expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(own.grad.double(), masked.grad, atol=1e-6, rtol=1e-5)


def test_what_ties_with_the_last_kept_is_kept():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert lowest_kept(logits, top_p=1.0, top_k=2).tolist() == [[2.0]]
    assert lowest_kept(logits, top_p=1.0, top_k=99).tolist() == [[0.0]]
    assert lowest_kept(logits, top_p=1e-9, top_k=0).tolist() == [[3.0]]
