"""Sampling from a policy with a key-value cache: the same tokens whatever the batch, the layout or the machine's load.

Legend: B prompts, K samples of each, N = B·K sequences still running, P prompt tokens (padded), V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.attention import PLANS, AttentionPlan, KeyValueCache
from nemotron_launch.trainer.megatron.logprobs import mask_padding
from nemotron_launch.trainer.policy import Policy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.transformer.utils import set_model_to_sequence_parallel


@dataclass(frozen=True)
class Completion:
    """What the policy wrote behind one prompt: ids with the stop token, if it came, and their log-probabilities.

    logps: nats under the distribution that was sampled from (its temperature applied); greedy: temperature 1.
    """

    ids: np.ndarray
    logps: np.ndarray
    stopped: bool


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    first_key: int = 0,
) -> list[Completion]:
    """`samples` continuations of each prompt, in prompt order; temperature 0 is greedy.

    Random numbers depend on seed, the sequence's number (first_key onwards) and the token's place alone. All ranks of
    one model replica call this with the same prompts; replicas may differ. Runs with any tensor and pipeline size.
    Raises UserError for an empty prompt.
    """
    if not prompts:
        return []
    if not all(len(prompt) for prompt in prompts):
        raise UserError("an empty prompt cannot be continued: there is no token to predict the first from")
    was_training = policy.gpt.training
    policy.gpt.eval()
    try:
        with _without_sequence_parallel(policy.gpt):
            return _Sampler(policy, prompts, samples, max_new_tokens).run(temperature, seed, first_key, stop_ids)
    finally:
        policy.gpt.train(was_training)
        PLANS.clear()


class _Sampler:
    """The running batch: its cache, what each sequence holds so far, and which are done."""

    def __init__(self, policy: Policy, prompts: Sequence[np.ndarray], samples: int, max_new_tokens: int) -> None:
        self.policy = policy
        self.device = policy.layout.device
        self.max_new = max_new_tokens
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(self.lengths_B.max())
        tokens = np.zeros((len(prompts), width), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self.prompts_BP = torch.from_numpy(tokens).to(self.device)
        self.count = len(prompts) * samples
        row_N = torch.arange(len(prompts), device=self.device).repeat_interleave(samples)
        self.cache = KeyValueCache(capacity=max_new_tokens, row_N=row_N)
        places = torch.arange(width, device=self.device)
        padded = bool((self.lengths_B < width).any())
        self.prompt_mask_BP = places >= self.lengths_B[:, None] if padded else None

    def run(self, temperature: float, seed: int, first_key: int, stop_ids: Sequence[int]) -> list[Completion]:
        stops = torch.tensor(sorted(stop_ids), device=self.device)
        written = torch.zeros(self.count, self.max_new, dtype=torch.long, device=self.device)
        logps = torch.zeros(self.count, self.max_new, device=self.device)
        lengths = torch.zeros(self.count, dtype=torch.long, device=self.device)
        stopped = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        running = torch.arange(self.count, device=self.device)
        logits_NV = self._prefill()
        for place in range(self.max_new):
            keys = first_key + running
            next_N, logps_N = self._choose(logits_NV, temperature, seed, keys, place)
            written[running, place], logps[running, place] = next_N, logps_N
            lengths[running] = place + 1
            is_stop = torch.isin(next_N, stops)
            stopped[running] = is_stop
            left = (~is_stop).nonzero().squeeze(1)
            if place + 1 == self.max_new or not len(left):
                break
            if len(left) < len(running):
                running, next_N = running[left], next_N[left]
                self.cache.keep(left)
            logits_NV = self._decode(next_N, place)
        rows = zip(written.cpu().numpy(), logps.cpu().numpy(), lengths.tolist(), stopped.tolist(), strict=True)
        return [Completion(ids[:n], values[:n], done) for ids, values, n, done in rows]

    def _prefill(self) -> Tensor | None:
        """Run the prompts; the logits behind each prompt's last token, one row per sequence."""
        rows, width = self.prompts_BP.shape
        positions_SB = torch.arange(width, device=self.device)[:, None].expand(width, rows)
        cos, sin = self.policy.rotary.at(positions_SB, width)
        plan = AttentionPlan(width, 1, 0, cos, sin, None, self.cache)
        places = (self.lengths_B - 1) * rows + torch.arange(rows, device=self.device)
        logits_BV = self._forward(self.prompts_BP, plan, places)
        return None if logits_BV is None else logits_BV[self.cache.row_N]

    def _decode(self, tokens_N: Tensor, place: int) -> Tensor | None:
        """Run one more token of every running sequence."""
        positions_N = self.lengths_B[self.cache.row_N] + place
        cos, sin = self.policy.rotary.at(positions_N[None], self.prompts_BP.shape[1] + place)
        plan = AttentionPlan(0, 1, 1, cos, sin, self.prompt_mask_BP, self.cache)
        places = torch.arange(len(tokens_N), device=self.device)
        logits_NV = self._forward(tokens_N[:, None], plan, places)
        self.cache.length += 1
        return logits_NV

    def _forward(self, tokens_BS: Tensor, plan: AttentionPlan, places: Tensor) -> Tensor | None:
        """One pass through all pipeline stages; the last stage's logits [N, V] over the whole vocabulary, fp32."""
        layout, gpt = self.policy.layout, self.policy.gpt
        if layout.last_stage:
            gpt.output_layer.wanted_N = places
        if not layout.first_stage:
            shape = (tokens_BS.shape[1], tokens_BS.shape[0], gpt.config.hidden_size)
            hidden = torch.empty(shape, dtype=self.policy.numerics.dtype, device=self.device)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            gpt.set_input_tensor(hidden)
        output = gpt(tokens_BS, None, PLANS.register(plan))
        PLANS.clear()
        if not layout.last_stage:
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        logits_NV = gather_from_tensor_model_parallel_region(output.squeeze(0)).float()
        return mask_padding(logits_NV, first=0, vocab_size=self.policy.architecture.vocab_size)

    def _choose(
        self, logits_NV: Tensor | None, temperature: float, seed: int, keys_N: Tensor, place: int
    ) -> tuple[Tensor, Tensor]:
        """The next token of every sequence and its log-probability, the same on every stage."""
        if logits_NV is None:
            next_N = torch.zeros(len(keys_N), dtype=torch.long, device=self.device)
            logps_N = torch.zeros(len(keys_N), device=self.device)
        else:
            logps_NV = torch.log_softmax(logits_NV / (temperature or 1.0), -1)
            if temperature == 0:
                next_N = logps_NV.argmax(-1)
            else:
                # Inverting the distribution function needs one number a token, which a counter gives in any order.
                summed_NV = logps_NV.double().exp().cumsum(-1)
                drawn_N1 = uniform(seed, keys_N, place)[:, None] * summed_NV[:, -1:]
                next_N = torch.searchsorted(summed_NV, drawn_N1, right=True).squeeze(1)
                next_N = next_N.clamp(max=self.policy.architecture.vocab_size - 1)
            logps_N = logps_NV.gather(1, next_N[:, None]).squeeze(1)
        return parallel.from_last_stage(next_N), parallel.from_last_stage(logps_N)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


def uniform(seed: int, keys_N: Tensor, place: int) -> Tensor:
    """Numbers in [0, 1), fp64, one for each (seed, key, place): SplitMix64 (Steele et al. 2014) as a hash."""
    state = torch.zeros_like(keys_N)
    for value in (torch.full_like(keys_N, seed), keys_N, torch.full_like(keys_N, place)):
        state = _mix((state ^ value) + _GOLDEN)
    return (state >> 11 & (1 << 53) - 1).double() / (1 << 53)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ (z >> 31 & (1 << 33) - 1)


@contextmanager
def _without_sequence_parallel(model: torch.nn.Module) -> Iterator[None]:
    """A single token cannot be split along the sequence: run the modules without it for a while."""
    on = model.config.sequence_parallel  # type: ignore[union-attr]
    if on:
        set_model_to_sequence_parallel(model, False)
    try:
        yield
    finally:
        if on:
            set_model_to_sequence_parallel(model, True)
