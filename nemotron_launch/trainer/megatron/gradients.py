"""Parts of a layer with gradients written by hand: fewer passes over memory and less kept for them than autograd's.

Legend: F the MLP's inner width, H hidden, … any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up of the two halves of the last dimension (Shazeer 2020), [..., 2F] → [..., F]; keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad_x


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last dimension, [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class RMSNormalize(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich 2019), [..., H], in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = rms_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        product = grads[0] * normal
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        along = (product @ weight).unsqueeze(-1).div_(-x.shape[-1])
        grad_x = torch.mul(grads[0], weight, out=product).addcmul_(normal, along).mul_(scale)
        return grad_x, grad_weight, None
