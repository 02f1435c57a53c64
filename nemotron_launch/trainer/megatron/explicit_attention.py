"""Attention by batched products, with its rotary positions and a gradient written by hand: the fastest on CPU.

It holds every score, so it is for rows of some hundred tokens; torch's fused kernels hold none, and are slower there.
Heads that share keys are one taller factor of a product, so no key is repeated for them.

Legend: B prompts, K tails of each, P prompt tokens, R tail tokens, S = P + K·R, h heads, g key-value heads,
d head dimension, r = d/2; of one block (the prompts, or the tails): Q queries of a sequence, T keys that it sees,
the last Q of which are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nemotron_launch.trainer.megatron.attention import AttentionPlan


@dataclass(frozen=True)
class Block:
    """Sequences of equal length in every row: the prompts (context 0) or the tails (context P)."""

    start: int
    sequences: int
    queries: int
    context: int

    def of(self, x_SBnd: Tensor) -> Tensor:
        """Its tokens, a view [B, sequences, n, Q, d]."""
        own = x_SBnd[self.start : self.start + self.sequences * self.queries]
        return own.unflatten(0, (self.sequences, self.queries)).permute(2, 0, 3, 1, 4)


def blocks(plan: AttentionPlan) -> Iterator[Block]:
    if plan.prompt:
        yield Block(0, 1, plan.prompt, 0)
    yield Block(plan.prompt, plan.tails, plan.tail, plan.prompt)


def explicit_scores(plan: AttentionPlan, rows: int, heads: int) -> int:
    """How many scores one layer holds."""
    return rows * heads * sum(b.sequences * b.queries * (b.context + b.queries) for b in blocks(plan))


class ExplicitAttention(torch.autograd.Function):
    """query [S, B, h, d], key and value [S, B, g, d], not yet rotated → [S, B, h·d]; sees what the plan says."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        s, b, h, d = query.shape
        g = key.shape[2]
        out = query.new_empty(s, b, h, d)
        kept: list[Tensor] = []
        for block in blocks(plan):
            n, q, c = block.sequences, block.queries, block.context
            cos, sin = block.of(plan.cos), block.of(plan.sin)
            queries = query.new_empty(b, n, h, q, d)
            keys, values = key.new_empty(b, n, g, c + q, d), value.new_empty(b, n, g, c + q, d)
            rotate(block.of(query), cos * scale, sin * scale, out=queries)
            rotate(block.of(key), cos, sin, out=keys[..., c:, :])
            values[..., c:, :] = block.of(value)
            if c:
                keys[..., :c, :], values[..., :c, :] = kept[1], kept[2]
            probs = torch.bmm(_by_group(queries, g), _by_group(keys, g).mT)
            by_query = probs.view(b, n, h, q, c + q)
            by_query[..., c:] += plan.causal_bias(q, q, query)
            if c and plan.prompt_mask_BP is not None:
                by_query[..., :c].masked_fill_(plan.prompt_mask_BP[:, None, None, None], -torch.inf)
            torch.softmax(probs, -1, out=probs)
            block.of(out).copy_(torch.bmm(probs, _by_group(values, g)).view_as(queries))
            kept += [queries, keys, values, probs]
        ctx.save_for_backward(plan.cos, plan.sin, *kept)
        ctx.plan, ctx.scale = plan, scale
        return out.view(s, b, h * d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        cos, sin, *kept = ctx.saved_tensors
        s, b, _ = grads[0].shape
        h, g, d = kept[0].shape[2], kept[1].shape[2], kept[0].shape[4]
        grad_out = grads[0].reshape(s, b, h, d)
        grad_query, grad_key, grad_value = (grad_out.new_empty(s, b, n, d) for n in (h, g, g))
        to_prompt: tuple[Tensor, Tensor] | None = None  # the tails' share in the gradient of the prompts' keys, values
        for i, block in reversed(list(enumerate(blocks(ctx.plan)))):
            queries, keys, values, probs = kept[4 * i : 4 * i + 4]
            c, grad_block = block.context, _by_group(block.of(grad_out).contiguous(), g)
            grad_values = torch.bmm(probs.mT, grad_block).view_as(values)
            grad_scores = torch.bmm(grad_block, _by_group(values, g).mT)
            torch.ops.aten._softmax_backward_data.out(grad_scores, probs, -1, probs.dtype, grad_input=grad_scores)
            grad_queries = torch.bmm(grad_scores, _by_group(keys, g)).view_as(queries)
            grad_keys = torch.bmm(grad_scores.mT, _by_group(queries, g)).view_as(keys)
            if to_prompt:
                grad_keys[:, 0] += to_prompt[0]
                grad_values[:, 0] += to_prompt[1]
            if c:
                to_prompt = grad_keys[..., :c, :].sum(1), grad_values[..., :c, :].sum(1)
            # A rotation's gradient is the rotation by the opposite angle.
            rotate(grad_queries, block.of(cos) * ctx.scale, block.of(sin) * -ctx.scale, out=block.of(grad_query))
            rotate(grad_keys[..., c:, :], block.of(cos), -block.of(sin), out=block.of(grad_key))
            block.of(grad_value).copy_(grad_values[..., c:, :])
        return grad_query, grad_key, grad_value, None, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, sequences, heads, tokens, d], contiguous, as [B·sequences·g, heads/g·tokens, d]."""
    b, n, heads, tokens, d = x.shape
    return x.view(b * n * groups, heads // groups * tokens, d)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> Tensor:
    """Rotary position embedding, halves convention (Su et al. 2021; as Llama and megatron-core lay the halves out)."""
    low, high = x.chunk(2, -1)
    out_low, out_high = out.chunk(2, -1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return out
