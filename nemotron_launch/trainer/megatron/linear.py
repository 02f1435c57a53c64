"""Linear layers on CPU by oneDNN's matrix products, where they beat PyTorch's default, MKL.

MKL runs its AVX-512 kernels on Intel's processors alone. On another one with AVX-512 oneDNN is twice as fast in fp32,
and as exact. PyTorch reaches it from its compiler's CPU backend only, whose operator is used here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 on which MKL does not use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        vendor = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return vendor is not None and vendor[1] != "GenuineIntel"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] by weight [n, k] (and bias [n]) to [..., n], as torch.nn.functional.linear."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and onednn_is_faster():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def fixed_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x to linear(x, weight, bias), without gradients, for a weight that stays the same for many calls.

    Where oneDNN is used its copy of the weight is laid out once, as its kernels want it; the products are the same.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and onednn_is_faster():
        product = torch.ops.mkldnn._linear_pointwise.default
        packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach())
        return lambda x: product(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_Nn, x_Nk = grads[0].flatten(0, -2), x.flatten(0, -2)
        grad_x = _by_transposed(grads[0], weight.t()) if wants_x else None
        grad_weight = None
        if wants_weight:
            # The first factor is copied to be laid out by rows: let that be the narrower one.
            if grad_Nn.shape[1] > x_Nk.shape[1]:
                grad_weight = _by_transposed(x_Nk.t(), grad_Nn.t()).t()
            else:
                grad_weight = _by_transposed(grad_Nn.t(), x_Nk.t())
        return grad_x, grad_weight, grad_Nn.sum(0) if wants_bias else None


def _by_transposed(a: Tensor, b_nk: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [..., k] by the transpose of b [n, k]."""
    if not a.numel():  # no token of a micro-batch counts; oneDNN takes no empty product
        return F.linear(a, b_nk, bias)
    return torch.ops.mkldnn._linear_pointwise.default(a, b_nk, bias, "none", [], "")


def parallel_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None = None,
    **_: Any,
) -> Tensor:
    """In place of megatron-core's two functions below its column- and row-parallel layers, with their parameters."""
    from megatron.core.tensor_parallel import mappings

    if sequence_parallel:
        # Its backward scatters the sum over ranks, so the product needs no reduction of its own.
        input = mappings.gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = mappings.copy_to_tensor_model_parallel_region(input, group=tp_group)
    return linear(input, weight, bias)
