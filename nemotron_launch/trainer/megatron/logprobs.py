"""Log-probabilities of given tokens from logits that are split over the tensor-parallel ranks.

Legend: N tokens, V vocabulary, v this rank's part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def token_logps(logits_Nv: Tensor, targets_N: Tensor, *, first: int, group: dist.ProcessGroup | None) -> Tensor:
    """log softmax(logits)[target] in nats, fp32, [N]; the full [N, V] logits exist on no rank.

    first: index of this rank's first column in the vocabulary. Columns of padding must already hold -inf.
    """
    return _TokenLogps.apply(logits_Nv, targets_N, first, group)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Nv: Tensor, targets_N: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
        parallel = group is not None and group.size() > 1
        logits = logits_Nv.float()
        local_N1 = (targets_N - first).unsqueeze(1)
        if parallel:
            logps_Nv = logits - _log_of_sum(logits.logsumexp(-1, keepdim=True), group)
            mine_N1 = (local_N1 >= 0) & (local_N1 < logits.shape[1])
            local_N1 = local_N1.clamp(0, logits.shape[1] - 1)
            target_N1 = logps_Nv.gather(1, local_N1).where(mine_N1, torch.zeros((), device=logits.device))
            dist.all_reduce(target_N1, group=group)
        else:
            logps_Nv = logits.log_softmax(-1)
            mine_N1 = torch.ones((), dtype=torch.bool, device=logits.device)
            target_N1 = logps_Nv.gather(1, local_N1)
        ctx.save_for_backward(logps_Nv, local_N1, mine_N1)
        ctx.dtype = logits_Nv.dtype
        return target_N1.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logps_Nv, local_N1, mine_N1 = ctx.saved_tensors
        grad_N1 = grads[0].unsqueeze(1)
        out_Nv = logps_Nv.exp().mul_(-grad_N1)
        out_Nv.scatter_add_(1, local_N1, (grad_N1 * mine_N1).expand_as(local_N1))
        return out_Nv.to(ctx.dtype), None, None, None


def _log_of_sum(logs_N1: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log of the sum over the ranks of exp(logs)."""
    highest_N1 = logs_N1.clone()
    dist.all_reduce(highest_N1, op=dist.ReduceOp.MAX, group=group)
    sums_N1 = (logs_N1 - highest_N1).exp_()
    dist.all_reduce(sums_N1, group=group)
    return highest_N1 + sums_N1.log_()


def mask_padding(logits_Nv: Tensor, *, first: int, vocab_size: int) -> Tensor:
    """Logits with the columns at or above vocab_size (padding for tensor parallelism) at -inf."""
    padded = first + logits_Nv.shape[1] - vocab_size
    if padded <= 0:
        return logits_Nv
    columns = torch.arange(first, first + logits_Nv.shape[1], device=logits_Nv.device)
    return logits_Nv.masked_fill(columns >= vocab_size, float("-inf"))
