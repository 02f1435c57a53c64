"""Hand-written gradients and oneDNN's products against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemotron_launch.trainer.megatron import linear as linear_module
from nemotron_launch.trainer.megatron.gradients import RMSNormalize, SwiGLU
from nemotron_launch.trainer.megatron.linear import linear
from nemotron_launch.trainer.megatron.logprobs import token_logps


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


def test_swiglu_and_its_gradient_are_those_of_the_formula():
    x = drawn(3, 2, 10)
    assert torch.equal(SwiGLU.apply(x), F.silu(x[..., :5]) * x[..., 5:])
    assert torch.autograd.gradcheck(SwiGLU.apply, (x,))


def test_rms_norm_and_its_gradient_are_torchs():
    x, weight = drawn(3, 2, 6), drawn(6)
    torch.testing.assert_close(RMSNormalize.apply(x, weight, 1e-3), F.rms_norm(x, (6,), weight, 1e-3))
    assert torch.autograd.gradcheck(lambda x, w: RMSNormalize.apply(x, w, 1e-3), (x, weight))


def test_rms_norm_takes_the_strided_keys_of_a_joint_projection():
    joint, weight = drawn(5, 2, 3, 12), drawn(4)
    got, want = RMSNormalize.apply(joint[..., 4:8], weight, 1e-6), F.rms_norm(joint[..., 4:8], (4,), weight, 1e-6)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (joint, weight)),
        torch.autograd.grad(want.square().sum(), (joint, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_token_logps_and_its_gradient_are_those_of_log_softmax():
    logits, targets = drawn(7, 11), torch.tensor([0, 10, 3, 3, 5, 1, 9])
    got = token_logps(logits, targets, first=0, group=None)
    assert got.dtype == torch.float32
    want = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    weights = torch.linspace(-1, 1, 7)
    (a,) = torch.autograd.grad((got * weights).sum(), logits)
    (b,) = torch.autograd.grad((want * weights).sum(), logits)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN's products whatever the processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("wide", [False, True], ids=["n<k", "n>k"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", [(6, 4), (1, 1), (0, 1)], ids=str)
def test_onednn_products_and_gradients_are_those_of_a_linear_layer(onednn, tokens, biased, wide):
    n, k = (40, 24) if wide else (24, 40)
    inputs = [drawn(*tokens, k, dtype=torch.float32), drawn(n, k, dtype=torch.float32)]
    if biased:
        inputs.append(drawn(n, dtype=torch.float32))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = linear(*inputs), F.linear(*exact)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    # Sums of 40 products of normal numbers in fp32.
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_onednn_rounds_a_token_alike_in_every_batch(onednn):
    """Sampled texts must not depend on how many sequences still run."""
    x, weight = drawn(64, 40, dtype=torch.float32), drawn(24, 40, dtype=torch.float32)
    whole = linear(x, weight)
    for rows in (2, 3, 7, 16, 33):
        assert torch.equal(linear(x[:rows], weight), whole[:rows])
