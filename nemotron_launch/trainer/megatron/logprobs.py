"""Log-probabilities of given tokens from logits that are split over the tensor-parallel ranks.

Legend: N tokens, V vocabulary, v this rank's part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of a rank that are gathered at a time to find the likeliest.
_GATHERED = 16 << 20


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


def lowest_kept(logits_NV: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """The lowest logit [N, 1] that stays when only the top_k (0: all) and of these the top_p likeliest tokens may be.

    top_p as in Holtzman et al. 2020: the fewest likeliest tokens whose probabilities reach it. Whole rows of the
    vocabulary, the temperature applied. Keeping by value keeps ties, so the result depends on no order of sorting.
    """
    if top_p >= 1:
        return logits_NV.topk(min(top_k, logits_NV.shape[1]), -1).values[:, -1:]
    falling_NV = logits_NV.float().sort(-1, descending=True).values
    if 0 < top_k < falling_NV.shape[1]:
        falling_NV = falling_NV[:, :top_k]
    probs_NV = falling_NV.double().softmax(-1)
    before_NV = probs_NV.cumsum(-1) - probs_NV
    last_N1 = (before_NV < top_p).sum(-1, keepdim=True) - 1
    return falling_NV.gather(1, last_N1.clamp(min=0)).to(logits_NV.dtype)


def keep_likeliest(
    logits_Nv: Tensor, targets_N: Tensor, *, top_p: float, top_k: int, first: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Logits with all at -inf that `lowest_kept` leaves out, but for the targets, which always stay.

    What is kept is taken as given: no gradient passes through the choice. The whole vocabulary is gathered for a few
    tokens at a time. first, group: as in `token_logps`.
    """
    with torch.no_grad():
        parallel = group is not None and group.size() > 1
        lowest = []
        for part_Nv in logits_Nv.detach().split(max(_GATHERED // logits_Nv.shape[1], 1)):
            if parallel:
                parts = [torch.empty_like(part_Nv) for _ in range(group.size())]  # type: ignore[union-attr]
                dist.all_gather(parts, part_Nv.contiguous(), group=group)
                part_Nv = torch.cat(parts, 1)
            lowest.append(lowest_kept(part_Nv, top_p=top_p, top_k=top_k))
        left_out_Nv = logits_Nv < torch.cat(lowest) if lowest else logits_Nv < logits_Nv
        local_N1 = (targets_N - first).unsqueeze(1)
        mine_N1 = (local_N1 >= 0) & (local_N1 < logits_Nv.shape[1])
        local_N1 = local_N1.clamp(0, logits_Nv.shape[1] - 1)
        left_out_Nv.scatter_(1, local_N1, left_out_Nv.gather(1, local_N1) & ~mine_N1)
    return logits_Nv.masked_fill(left_out_Nv, -torch.inf)


def mask_padding(logits_Nv: Tensor, *, first: int, vocab_size: int) -> Tensor:
    """Logits with the columns at or above vocab_size (padding for tensor parallelism) at -inf."""
    padded = first + logits_Nv.shape[1] - vocab_size
    if padded <= 0:
        return logits_Nv
    columns = torch.arange(first, first + logits_Nv.shape[1], device=logits_Nv.device)
    return logits_Nv.masked_fill(columns >= vocab_size, float("-inf"))
