"""One more token of every running sequence, computed straight from the policy's weights.

megatron-core's modules are made for training: walking through them costs more than a small model's arithmetic, and a
fused attention would need a copy of the prompt's keys for each of its samples. Here the samples of a prompt attend to
the one copy together. The arithmetic is that of model.py's modules.

Legend: B prompts, K samples of each that still run (the most of any), N sequences in the running batch, P prompt
tokens (padded), T tokens written, H hidden, g key-value heads, q query heads of each, d head dimension; g and v (the
vocabulary) are this rank's part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemotron_launch.trainer.megatron.explicit_attention import rotate
from nemotron_launch.trainer.megatron.gradients import rms_scale
from nemotron_launch.trainer.megatron.linear import fixed_linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

if TYPE_CHECKING:
    from nemotron_launch.trainer.policy import Policy

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """What one layer computes with. norm_qk: weights [q + 1, d] of the norms of a group's queries and its key."""

    norm_1: Tensor
    qkv: Linear
    norm_qk: Tensor | None
    proj: Linear
    norm_2: Tensor
    fc1: Linear
    fc2: Linear


class Weights:
    """A policy's weights as they are now, laid out for many small products."""

    def __init__(self, policy: Policy) -> None:
        gpt: Any = policy.gpt
        a, self.layout = policy.architecture, policy.layout
        self.eps = a.rms_norm_eps
        self.hidden, self.head_dim, self.vocab = a.hidden_size, a.head_dim, a.vocab_size
        self.groups = max(a.num_key_value_heads // self.layout.tensor, 1)
        self.per_group = a.num_attention_heads // self.layout.tensor // self.groups
        self.dtype = policy.numerics.dtype
        self.layers = [self._layer(layer) for layer in gpt.decoder.layers]
        self.embedding = gpt.embedding.word_embeddings.weight.detach() if self.layout.first_stage else None
        if self.layout.last_stage:
            tied = gpt.share_embeddings_and_output_weights
            self.norm = gpt.decoder.final_layernorm.weight.detach()
            self.output = fixed_linear(gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight)

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attention, layer.mlp
        norm_qk = None
        if getattr(attention.q_layernorm, "weight", None) is not None:
            q, k = attention.q_layernorm.weight.detach(), attention.k_layernorm.weight.detach()
            norm_qk = torch.stack([*[q] * self.per_group, k])
        return Layer(
            norm_1=layer.input_layernorm.weight.detach(),
            qkv=fixed_linear(attention.linear_qkv.weight, attention.linear_qkv.bias),
            norm_qk=norm_qk,
            proj=fixed_linear(attention.linear_proj.weight),
            norm_2=layer.pre_mlp_layernorm.weight.detach(),
            fc1=fixed_linear(mlp.linear_fc1.weight),
            fc2=fixed_linear(mlp.linear_fc2.weight),
        )

    def embed(self, tokens_N: Tensor) -> Tensor:
        """[N, H], the same on all tensor-parallel ranks."""
        assert self.embedding is not None
        if self.layout.tensor == 1:
            return F.embedding(tokens_N, self.embedding)
        rows = len(self.embedding)
        own_N = tokens_N - self.layout.tensor_rank * rows
        mine_N = (own_N >= 0) & (own_N < rows)
        return self.summed(F.embedding(own_N.clamp(0, rows - 1), self.embedding) * mine_N[:, None])

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] of the whole vocabulary without its padding, fp32."""
        logits_NV = gather_from_tensor_model_parallel_region(self.output(self.normal(hidden_NH, self.norm)))
        return logits_NV.float()[:, : self.vocab]

    def normal(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        if x.device.type == "cpu":
            return (x * rms_scale(x, self.eps)).mul_(weight)
        if weight.dim() == 1:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * weight

    def summed(self, part: Tensor) -> Tensor:
        """Over the tensor-parallel ranks, in place."""
        if self.layout.tensor > 1:
            dist.all_reduce(part, group=parallel_state.get_tensor_model_parallel_group())
        return part


class Decoder:
    """The running batch: keys and values of the prompts, once each, and of the tails as they grow.

    prompts: rotated keys and values [B, g, P, d] by layer. lengths_B: of the prompts. row_N: which prompt a sequence
    continues, in rising order. capacity: tokens of the longest tail.
    """

    def __init__(
        self,
        weights: Weights,
        prompts: Mapping[int, tuple[Tensor, Tensor]],
        lengths_B: Tensor,
        row_N: np.ndarray,
        capacity: int,
    ) -> None:
        self.weights = weights
        self.prompts = [prompts[number] for number in sorted(prompts)]
        self.device = lengths_B.device
        self.lengths_B = lengths_B
        self.width = self.prompts[0][0].shape[2]
        self.capacity = capacity
        self.length = 0
        self.tails: list[tuple[Tensor, Tensor]] = []
        self._rows(row_N)

    def _rows(self, row_N: np.ndarray) -> None:
        """Take `row_N` as the running batch: who shares a prompt, and prompts that nobody continues any more."""
        present_B, self.row_N, counts_B = np.unique(row_N, return_inverse=True, return_counts=True)
        if len(present_B) < len(self.lengths_B):
            kept = torch.from_numpy(present_B).to(self.device)
            self.lengths_B = self.lengths_B[kept]
            self.prompts = [(keys[kept], values[kept]) for keys, values in self.prompts]
        self.most = int(counts_B.max())
        place_N = np.arange(len(row_N)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
        # Places of the rectangle [B, K]: the sequence in each (0 where there is none), and the place of each sequence.
        self.of_place: Tensor | None = None
        self.place_of: Tensor | None = None
        if counts_B.min() < self.most:
            of_place = np.zeros((len(present_B), self.most), np.int64)
            of_place[self.row_N, place_N] = np.arange(len(row_N))
            self.of_place = torch.from_numpy(of_place.reshape(-1)).to(self.device)
            self.place_of = torch.from_numpy(self.row_N * self.most + place_N).to(self.device)
        self.first_N = self.lengths_B[torch.from_numpy(self.row_N).to(self.device)]
        beyond_BP = torch.arange(self.width, device=self.device) >= self.lengths_B[:, None]
        self.padding = beyond_BP[:, None, None] if bool(beyond_BP.any()) else None

    def keep(self, rows: np.ndarray) -> None:
        """Go on with the sequences `rows` alone."""
        kept = torch.from_numpy(rows).to(self.device)
        self.tails = [tuple(self._resized(x, kept) for x in tail) for tail in self.tails]  # type: ignore[misc]
        self._rows(self.row_N[rows])

    def _resized(self, old: Tensor, rows: Tensor | None = None, size: int | None = None) -> Tensor:
        """A copy of keys or values with some of the sequences or room for more tokens."""
        n, g, room, d = old.shape
        new = old.new_empty(n if rows is None else len(rows), g, size or room, d)
        used = old[:, :, : self.length]
        new[:, :, : self.length] = used if rows is None else used[rows]
        return new

    def _grow(self) -> None:
        """Room for the next token, doubling, since most answers end early."""
        room = self.tails[0][0].shape[2] if self.tails else 0
        if self.length < room:
            return
        w, size = self.weights, min(max(2 * room, 32), self.capacity)
        if not self.tails:
            shape = (len(self.row_N), w.groups, size, w.head_dim)
            self.tails = [(k.new_empty(shape), v.new_empty(shape)) for k, v in self.prompts]
        else:
            self.tails = [tuple(self._resized(x, size=size) for x in tail) for tail in self.tails]  # type: ignore[misc]

    def step(self, hidden_NH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """This stage's layers on the newest token of every sequence. cos, sin [N, 1, 1, d/2] of `positions`."""
        w = self.weights
        n, g, q, d = len(hidden_NH), w.groups, w.per_group, w.head_dim
        self._grow()
        for layer, prompt, tail in zip(w.layers, self.prompts, self.tails, strict=True):
            qkv_Ngxd = layer.qkv(w.normal(hidden_NH, layer.norm_1)).view(n, g, q + 2, d)
            mixed = qkv_Ngxd[:, :, : q + 1]
            if layer.norm_qk is not None:
                mixed = w.normal(mixed, layer.norm_qk)
            rotated = rotate(mixed, cos, sin, out=mixed.new_empty(n, g, q + 1, d))
            tail[0][:, :, self.length] = rotated[:, :, q]
            tail[1][:, :, self.length] = qkv_Ngxd[:, :, q + 1]
            attended = self._attend(rotated[:, :, :q] * d**-0.5, prompt, tail)
            hidden_NH = hidden_NH + w.summed(layer.proj(attended.view(n, g * q * d)))
            gate, up = layer.fc1(w.normal(hidden_NH, layer.norm_2)).chunk(2, -1)
            hidden_NH = hidden_NH + w.summed(layer.fc2(F.silu(gate).mul_(up)))
        self.length += 1
        return hidden_NH

    @property
    def positions(self) -> Tensor:
        """Where the next token of each sequence stands, [N]."""
        return self.first_N + self.length

    def _attend(self, q_Ngqd: Tensor, prompt: tuple[Tensor, Tensor], tail: tuple[Tensor, Tensor]) -> Tensor:
        """[N, g, q, d], scaled → [N, g, q, d]; scores in fp32 whatever the cache is in."""
        n, g, q, d = q_Ngqd.shape
        width, length = self.width, self.length + 1
        keys, values = (x[:, :, :length].flatten(0, 1).float() for x in tail)
        prompt_keys, prompt_values = (x.flatten(0, 1).float() for x in prompt)
        queries = q_Ngqd.float()
        scores = queries.new_empty(n, g, q, width + length)
        together = torch.bmm(self._by_prompt(queries), prompt_keys.mT)
        if self.padding is not None:
            together.view(len(self.lengths_B), g, -1, width).masked_fill_(self.padding, -torch.inf)
        scores[..., :width] = self._by_sequence(together, g, q)
        scores.view(n * g, q, -1)[..., width:] = torch.bmm(queries.reshape(n * g, q, d), keys.mT)
        probs = torch.softmax(scores, -1)
        out = self._by_sequence(torch.bmm(self._by_prompt(probs[..., :width]), prompt_values), g, q)
        own = torch.bmm(probs.view(n * g, q, -1)[..., width:], values).view(n, g, q, d)
        return own.add_(out).to(q_Ngqd.dtype)

    def _by_prompt(self, x_Ngqx: Tensor) -> Tensor:
        """[N, g, q, x] → [B·g, K·q, x]: the samples of a prompt side by side."""
        _, g, q, x = x_Ngqx.shape
        if self.of_place is not None:
            x_Ngqx = x_Ngqx.index_select(0, self.of_place)
        return x_Ngqx.unflatten(0, (-1, self.most)).transpose(1, 2).reshape(-1, self.most * q, x)

    def _by_sequence(self, x: Tensor, g: int, q: int) -> Tensor:
        """The converse of `_by_prompt`."""
        back = x.view(-1, g, self.most, q, x.shape[-1]).transpose(1, 2)
        if self.place_of is None:
            return back.flatten(0, 1)
        return back.flatten(0, 1).index_select(0, self.place_of)
