"""Sampling from a policy with a key-value cache: the same tokens whatever the batch, the layout or the machine's load.

Legend: B prompts, K samples of each, N sequences in the running batch, P prompt tokens (padded), V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.attention import PLANS, AttentionPlan, KeyValueCache
from nemotron_launch.trainer.megatron.logprobs import lowest_kept
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.rollouts import Completion, Sampling
from nemotron_launch.trainer.stop_strings import StopStrings
from nemotron_launch.trainer.tokenizer import Tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.transformer.utils import set_model_to_sequence_parallel


class MegatronGenerator:
    """The engine in the trainer's own processes: it samples with the very weights that are trained.

    batch_size: sequences at once (None: all); it changes memory and speed, not the result.
    max_length: tokens of prompt and answer together at which an answer ends (None: no such limit). tokenizer: needed
    for stop strings alone.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self._stop_strings: dict[tuple[str, ...], StopStrings] = {}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        samples: int = 1,
        seed: int = 0,
        step: int = 0,
        prompt_keys: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in prompt order.

        All ranks of one model replica call this with the same prompts; replicas may differ. prompt_keys: what names a
        prompt in random numbers (None: its place). Runs with any tensor and pipeline size. A prompt that fills
        max_length gets empty answers. Raises UserError for an empty prompt.
        """
        if not all(len(prompt) for prompt in prompts):
            raise UserError("an empty prompt cannot be continued: there is no token to predict the first from")
        keys = list(range(len(prompts)) if prompt_keys is None else prompt_keys)
        done: list[list[Completion]] = [[] for _ in prompts]
        policy = self.policy
        was_training = policy.gpt.training
        policy.gpt.eval()
        try:
            with _without_sequence_parallel(policy.gpt):
                for part, first, count in self._parts(prompts, samples):
                    states = sample_states(
                        seed, step, [keys[i] for i in part], range(first, first + count), policy.layout.device
                    )
                    batch = _Sampler(policy, [prompts[i] for i in part], sampling, count, self.max_length)
                    completions = batch.run(states, self._stops(sampling))
                    for place, i in enumerate(part):
                        done[i] += completions[place * count : (place + 1) * count]
        finally:
            policy.gpt.train(was_training)
            PLANS.clear()
        return done

    def refresh(self) -> None:
        """Nothing: the weights are the policy's own."""

    def close(self) -> None:
        """Nothing is held."""

    def _parts(self, prompts: Sequence[np.ndarray], samples: int) -> Iterator[tuple[list[int], int, int]]:
        """What is run together: prompts of similar lengths, first sample, samples of each."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        most = self.batch_size or max(len(order) * samples, 1)
        size = max(most // samples, 1)
        for start in range(0, len(order), size):
            for first in range(0, samples, most):
                yield order[start : start + size], first, min(most, samples - first)

    def _stops(self, sampling: Sampling) -> StopStrings | None:
        if not sampling.stop_strings:
            return None
        assert self.tokenizer is not None, "stop strings need a tokenizer"
        if sampling.stop_strings not in self._stop_strings:
            made = StopStrings(self.tokenizer, sampling.stop_strings, self.policy.layout.device)
            self._stop_strings[sampling.stop_strings] = made
        return self._stop_strings[sampling.stop_strings]


class _Sampler:
    """The running batch: its cache, what each sequence holds so far, and which are done."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        samples: int,
        max_length: int | None,
    ) -> None:
        self.policy = policy
        self.sampling = sampling
        self.device = policy.layout.device
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(self.lengths_B.max())
        tokens = np.zeros((len(prompts), width), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self.prompts_BP = torch.from_numpy(tokens).to(self.device)
        self.count = len(prompts) * samples
        row_N = torch.arange(len(prompts), device=self.device).repeat_interleave(samples)
        rooms = [sampling.max_new_tokens if max_length is None else max_length - len(prompt) for prompt in prompts]
        rooms = [min(max(room, 0), sampling.max_new_tokens) for room in rooms]
        self.room_N = torch.tensor(rooms, device=self.device)[row_N]
        self.max_new = max(rooms)
        self.cache = KeyValueCache(capacity=self.max_new, row_N=row_N)
        places = torch.arange(width, device=self.device)
        padded = bool((self.lengths_B < width).any())
        self.prompt_mask_BP = places >= self.lengths_B[:, None] if padded else None

    def run(self, states: Tensor, stop_strings: StopStrings | None) -> list[Completion]:
        """All completions, in order. states: of the random numbers, one a sequence."""
        stops = torch.tensor(sorted(self.sampling.stop_ids), device=self.device)
        written = torch.zeros(self.count, self.max_new, dtype=torch.long, device=self.device)
        logps = torch.zeros(self.count, self.max_new, device=self.device)
        lengths = torch.zeros(self.count, dtype=torch.long, device=self.device)
        stopped = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        running = self.room_N.nonzero().squeeze(1)
        logits_NV = None
        if len(running):
            logits_NV = self._prefill()
        if len(running) < self.count:
            logits_NV = None if logits_NV is None else logits_NV[running]
            self.cache.keep(running)
        for place in range(self.max_new):
            next_N, logps_N = self._choose(logits_NV, uniform(states[running], place))
            written[running, place], logps[running, place] = next_N, logps_N
            lengths[running] = place + 1
            is_stop = torch.isin(next_N, stops)
            if stop_strings is not None:
                is_stop = is_stop | stop_strings.ended(written, running, next_N, place + 1)
            stopped[running] = is_stop
            left = (~is_stop & (self.room_N[running] > place + 1)).nonzero().squeeze(1)
            if not len(left):
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
        return logits_NV[:, : self.policy.architecture.vocab_size]  # what follows is padding

    def _choose(self, logits_NV: Tensor | None, drawn_N: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of every sequence and its log-probability, the same on every stage."""
        if logits_NV is None:
            next_N = torch.zeros(len(drawn_N), dtype=torch.long, device=self.device)
            logps_N = torch.zeros(len(drawn_N), device=self.device)
        else:
            next_N, logps_N = choose(logits_NV, drawn_N, self.sampling)
        return parallel.from_last_stage(next_N), parallel.from_last_stage(logps_N)


def choose(logits_NV: Tensor, drawn_N: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens for uniform numbers in [0, 1), and their log-probabilities; fp32 logits without padding."""
    if sampling.temperature == 0:
        logps_N, next_N = torch.log_softmax(logits_NV, -1).max(-1)
        return next_N, logps_N
    logits_NV = logits_NV / sampling.temperature
    if sampling.filters:
        lowest_N1 = lowest_kept(logits_NV, top_p=sampling.top_p, top_k=sampling.top_k)
        logits_NV = logits_NV.masked_fill(logits_NV < lowest_N1, -torch.inf)
    logps_NV = torch.log_softmax(logits_NV, -1)
    # Inverting the distribution function needs one number a token, which a counter gives in any order.
    summed_NV = logps_NV.double().exp().cumsum(-1)
    drawn_N1 = drawn_N[:, None] * summed_NV[:, -1:]
    next_N1 = torch.searchsorted(summed_NV, drawn_N1, right=True).clamp(max=logits_NV.shape[1] - 1)
    return next_N1.squeeze(1), logps_NV.gather(1, next_N1).squeeze(1)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


def sample_states(
    seed: int, step: int, prompt_keys: Sequence[int], samples: Sequence[int], device: torch.device
) -> Tensor:
    """Where the random numbers of each (seed, step, prompt, sample) begin, int64, a prompt's samples side by side."""
    prompt_N = torch.tensor(list(prompt_keys), device=device).repeat_interleave(len(samples))
    sample_N = torch.tensor(list(samples), device=device).repeat(len(prompt_keys))
    states_N = torch.zeros_like(prompt_N)
    for key in (seed, step, prompt_N, sample_N):
        states_N = _mix((states_N ^ key) + _GOLDEN)
    return states_N


def uniform(states_N: Tensor, place: int) -> Tensor:
    """Numbers in [0, 1), fp64, one for each (state, place): SplitMix64 (Steele et al. 2014) as a hash."""
    return (_mix((states_N ^ place) + _GOLDEN) >> 11 & (1 << 53) - 1).double() / (1 << 53)


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
