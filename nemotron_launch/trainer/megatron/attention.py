"""Attention over sequences that share a prompt: a core-attention module for megatron-core, with its rotary positions.

A row of the batch is one prompt and K continuations of it, laid side by side: [prompt | tail 1 | … | tail K]. A DPO
pair is K = 2, a GRPO group K = G, plain sequences K = 1 with an empty prompt. The prompt runs through the network
once, each tail sees the prompt and itself, so the result is that of K separate sequences.

Legend: B prompts, K tails of each, N = B·K tails, P prompt tokens (padded), R tail tokens (padded), S = P + K·R row
length, h heads, g key-value heads, d head dimension.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_launch.trainer.megatron.explicit_attention import ExplicitAttention, explicit_scores, rotate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.transformer.module import MegatronModule

# Above this many scores in a layer the CPU, too, uses torch's fused attention, which never holds them all.
MAX_EXPLICIT_SCORES = 32 << 20


@dataclass
class AttentionPlan:
    """One forward pass: where its tokens stand and what each may see.

    cos and sin [S, B, 1, d/2]: rotary tables in the order of the row. prompt_mask_BP: True on padding of the prompts,
    None where no prompt is padded. kept: when generating, where each layer leaves its keys and values, rotated,
    [B, g, S, d], else None. wanted_W: flat places s·B + b of the tokens with a logit, with which alone the last layer
    goes on; None for all.
    """

    prompt: int
    tails: int
    tail: int
    cos: Tensor
    sin: Tensor
    prompt_mask_BP: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    wanted_W: Tensor | None = None
    _bias: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def causal_bias(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """Additive [queries, keys] mask, the last query seeing all keys; kept for the next layer."""
        bias = self._bias.get((queries, keys))
        if bias is None:
            allowed = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
            bias = torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(~allowed, -math.inf)
            self._bias[queries, keys] = bias
        return bias


class PlanRegistry:
    """Hands plans through megatron-core: its `attention_mask` argument carries a plan's number as a CPU tensor.

    A tensor survives activation recompute and pipeline schedules, where backward of one micro-batch follows forward
    of another. `clear` drops the plans after a schedule has run.
    """

    def __init__(self) -> None:
        self._plans: dict[int, AttentionPlan] = {}
        self._numbers = itertools.count()

    def register(self, plan: AttentionPlan) -> Tensor:
        number = next(self._numbers)
        self._plans[number] = plan
        return torch.tensor(number)

    def __getitem__(self, ticket: Tensor) -> AttentionPlan:
        return self._plans[int(ticket)]

    def clear(self) -> None:
        self._plans.clear()


PLANS = PlanRegistry()


class PlannedAttention(MegatronModule):
    """The `core_attention` of every layer: rotates queries and keys, then attends as the registered plan says."""

    def __init__(self, config: Any, layer_number: int, *args: Any, softmax_scale: float | None = None, **kwargs: Any):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.keeps_wanted_only = False
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """query [S, B, h, d], key and value [S, B, g, d] → [S, B, h·d], or [W, 1, h·d] of the tokens wanted."""
        plan = PLANS[attention_mask]
        out = self._one_pass(query, key, value, plan)
        if self.keeps_wanted_only and plan.wanted_W is not None:
            out = out.flatten(0, 1).index_select(0, plan.wanted_W).unsqueeze(1)
        return out

    def _one_pass(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        on_cpu = query.device.type == "cpu" and plan.kept is None
        if on_cpu and explicit_scores(plan, *query.shape[1:3]) <= MAX_EXPLICIT_SCORES:
            return ExplicitAttention.apply(query, key, value, plan, self.scale or query.shape[-1] ** -0.5)
        q = Rotate.apply(query, plan.cos, plan.sin).permute(1, 2, 0, 3)
        k = Rotate.apply(key, plan.cos, plan.sin).permute(1, 2, 0, 3)
        v = value.permute(1, 2, 0, 3)
        if plan.kept is not None:
            plan.kept[self.layer_number] = (k.contiguous(), v.contiguous())
        out = self._attend(q, k, v, plan)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q_BhSd: Tensor, k_BgSd: Tensor, v_BgSd: Tensor, plan: AttentionPlan) -> Tensor:
        p, k_, r = plan.prompt, plan.tails, plan.tail
        if p == 0 and k_ == 1:
            return self._sdpa(q_BhSd, k_BgSd, v_BgSd, plan)
        parts = []
        if p:
            parts.append(self._sdpa(q_BhSd[:, :, :p], k_BgSd[:, :, :p], v_BgSd[:, :, :p], plan))
        keys, values = (self._with_prompt(x, p, k_, r) for x in (k_BgSd, v_BgSd))
        b, h, _, d = q_BhSd.shape
        q_NhRd = q_BhSd[:, :, p:].reshape(b, h, k_, r, d).transpose(1, 2).reshape(b * k_, h, r, d)
        mask_NP = None if plan.prompt_mask_BP is None else plan.prompt_mask_BP.repeat_interleave(k_, 0)
        tails = self._sdpa(q_NhRd, keys, values, plan, padding_NP=mask_NP)
        parts.append(tails.view(b, k_, h, r, d).transpose(1, 2).reshape(b, h, k_ * r, d))
        return torch.cat(parts, 2)

    @staticmethod
    def _with_prompt(x_BgSd: Tensor, p: int, k: int, r: int) -> Tensor:
        """[B, g, S, d] → [B·K, g, P + R, d]: each tail behind its own view of the prompt."""
        b, g, _, d = x_BgSd.shape
        tails = x_BgSd[:, :, p:].reshape(b, g, k, r, d).transpose(1, 2)
        prompt = x_BgSd[:, None, :, :p].expand(b, k, g, p, d)
        return torch.cat([prompt, tails], 3).flatten(0, 1)

    def _sdpa(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, padding_NP: Tensor | None = None
    ) -> Tensor:
        """Causal attention of q [N, h, Q, d] over k, v [N, g, T, d] whose last Q keys are the queries' own tokens."""
        h, queries, keys, scale = q.shape[1], q.shape[2], k.shape[2], self.scale
        grouped = k.shape[1] != h
        if queries == keys and padding_NP is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        allowed = plan.causal_bias(queries, keys, q) == 0
        if padding_NP is not None:
            allowed = allowed & ~F.pad(padding_NP, (0, queries))[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped)


class Rotate(torch.autograd.Function):
    """Rotary position embedding, halves convention (Su et al. 2021; as Llama and megatron-core lay the halves out).

    Saves nothing but the tables: the gradient is the rotation by the opposite angle.
    """

    @staticmethod
    def forward(ctx: Any, x_SBhd: Tensor, cos_SB1r: Tensor, sin_SB1r: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SB1r, sin_SB1r)
        return rotate(x_SBhd, cos_SB1r, sin_SB1r, out=torch.empty_like(x_SBhd, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_SB1r, sin_SB1r = ctx.saved_tensors
        return rotate(grads[0], cos_SB1r, -sin_SB1r, out=torch.empty_like(grads[0])), None, None


class RotaryTable:
    """cos and sin of every position that a policy can see, made once, in fp32, kept in the policy's dtype.

    rope_scaling is Hugging Face's (linear, dynamic, llama3, yarn, …) and is computed by transformers.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        theta: float,
        scaling: Mapping[str, Any] | None,
        max_positions: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        frequencies, self._factor = _frequencies(head_dim, theta, scaling, max_positions)
        self._frequencies = frequencies.to(device)
        self._dtype = dtype
        self._cos = self._sin = torch.empty(0, device=device)
        self._grow(min(max_positions, 4096))

    def _grow(self, positions: int) -> None:
        angles = (
            torch.arange(positions, device=self._frequencies.device, dtype=torch.float32)[:, None] * self._frequencies
        )
        self._cos = (angles.cos() * self._factor).to(self._dtype)
        self._sin = (angles.sin() * self._factor).to(self._dtype)

    def at(self, positions_SB: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """Tables [S, B, 1, d/2] for integer positions [S, B], none above `highest`."""
        if highest >= len(self._cos):
            self._grow(2 * (highest + 1))
        return self._cos[positions_SB].unsqueeze(2), self._sin[positions_SB].unsqueeze(2)


def _frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_positions: int
) -> tuple[Tensor, float]:
    if not scaling:
        return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0
    from transformers import LlamaConfig  # heavy, and only scaled models need it
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # transformers 4 reads rope_theta and rope_scaling, 5 reads rope_parameters.
    config = LlamaConfig(  # type: ignore[call-arg]
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
        rope_theta=theta,
        rope_scaling=dict(scaling),
        rope_parameters={**scaling, "rope_theta": theta},
    )
    initialise: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    frequencies, factor = initialise(config, torch.device("cpu"))
    return frequencies.float(), float(factor)
