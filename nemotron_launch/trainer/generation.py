"""Sampling from a policy with a key-value cache: the same tokens whatever the batch, the layout or the machine's load.

Legend: B prompts, K samples of each, N sequences in the running batch, P prompt tokens (padded), V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.attention import PLANS, AttentionPlan
from nemotron_launch.trainer.megatron.decode import Decoder, Weights
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
            weights = Weights(policy)
            with _without_sequence_parallel(policy.gpt):
                for part, first, count in self._parts(prompts, samples):
                    states = sample_states(
                        seed, step, [keys[i] for i in part], range(first, first + count), policy.layout.device
                    )
                    batch = _Sampler(policy, weights, [prompts[i] for i in part], sampling, count, self.max_length)
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
    """The running batch: what each sequence holds so far, and which are done."""

    def __init__(
        self,
        policy: Policy,
        weights: Weights,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        samples: int,
        max_length: int | None,
    ) -> None:
        self.policy = policy
        self.weights = weights
        self.sampling = sampling
        self.device = policy.layout.device
        lengths = np.array([len(prompt) for prompt in prompts])
        tokens = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self.prompts_BP = torch.from_numpy(tokens).to(self.device)
        self.lengths_B = torch.from_numpy(lengths).to(self.device)
        self.row_N = np.arange(len(prompts)).repeat(samples)
        rooms_B = np.full(len(prompts), sampling.max_new_tokens)
        if max_length is not None:
            rooms_B = np.clip(max_length - lengths, 0, sampling.max_new_tokens)
        self.room_N = rooms_B[self.row_N]
        self.max_new = int(rooms_B.max())
        # Which tokens end an answer; those that no model writes may be named too.
        self.stops_V = torch.zeros(max(policy.architecture.vocab_size, *sampling.stop_ids, 0) + 1, dtype=torch.bool)
        self.stops_V[list(sampling.stop_ids)] = True
        self.stops_V = self.stops_V.to(self.device)

    def run(self, states_N: Tensor, stop_strings: StopStrings | None) -> list[Completion]:
        """All completions, in order. states_N: of the random numbers, one a sequence.

        A finished sequence stays in the batch until those finished have cost as much as one more token of all: leaving
        is a copy of the cache. On a GPU it is looked for now and then only, since looking waits for the GPU.
        """
        count, every = len(self.row_N), 1 if self.device.type == "cpu" else 8
        written_RN = torch.zeros(self.max_new, count, dtype=torch.long, device=self.device)
        logps_RN = torch.zeros(self.max_new, count, device=self.device)
        lengths = torch.zeros(count, dtype=torch.long, device=self.device)
        stopped = torch.zeros(count, dtype=torch.bool, device=self.device)
        rows = self.room_N.nonzero()[0]
        batch = _Running.start(rows, self.room_N, states_N)
        logits_NV, waste = None, 0
        if len(rows):
            logits_BV, decoder = self._prefill(rows)
            logits_NV = None if logits_BV is None else logits_BV[torch.from_numpy(self.row_N[rows]).to(self.device)]
        for place in range(self.max_new):
            next_N = self._choose(logits_NV, batch.drawn(place), logps_RN[place], batch.rows_N)
            written_RN[place].index_copy_(0, batch.rows_N, next_N)
            ends_N = self.stops_V[next_N]
            if stop_strings is not None:
                ends_N |= stop_strings.ended(written_RN[: place + 1], batch.rows_N, next_N, ~batch.over_N)
            batch.note(ends_N, place)
            last = place + 1 == self.max_new
            if last or (place + 1) % every == 0:
                over = int(batch.over_N.sum())
                waste += over * every
                if last or over == len(batch.rows_N):
                    break
                if waste >= len(batch.rows_N):
                    left = (~batch.over_N).nonzero().squeeze(1)
                    batch.leave(lengths, stopped)
                    batch, next_N, waste = batch.of(left), next_N[left], 0
                    decoder.keep(left.cpu().numpy())
            logits_NV = self._decode(decoder, next_N)
        batch.leave(lengths, stopped)
        parallel.from_last_stage(logps_RN)
        ids, logps = written_RN.T.cpu().numpy(), logps_RN.T.cpu().numpy()
        parts = zip(ids, logps, lengths.tolist(), stopped.tolist(), strict=True)
        return [Completion(own[:n].copy(), values[:n].copy(), done) for own, values, n, done in parts]

    def _prefill(self, rows: np.ndarray) -> tuple[Tensor | None, Decoder]:
        """Run the prompts, once each; the logits behind their last tokens [B, V], and what goes on from there."""
        layout, gpt = self.policy.layout, self.policy.gpt
        count, width = self.prompts_BP.shape
        positions_SB = torch.arange(width, device=self.device)[:, None].expand(width, count)
        cos, sin = self.policy.rotary.at(positions_SB, width)
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        if layout.last_stage:
            gpt.output_layer.wanted_N = (self.lengths_B - 1) * count + torch.arange(count, device=self.device)
        if not layout.first_stage:
            gpt.set_input_tensor(self._received(width, count))
        output = gpt(self.prompts_BP, None, PLANS.register(AttentionPlan(0, 1, width, cos, sin, kept=kept)))
        PLANS.clear()
        decoder = Decoder(self.weights, kept, self.lengths_B, self.row_N[rows], self.max_new)
        if not layout.last_stage:
            self._send(output)
            return None, decoder
        logits_BV = gather_from_tensor_model_parallel_region(output.squeeze(0)).float()
        return logits_BV[:, : self.policy.architecture.vocab_size], decoder

    def _decode(self, decoder: Decoder, tokens_N: Tensor) -> Tensor | None:
        """Run one more token of every sequence through all stages; the last stage's logits [N, V]."""
        layout, width = self.policy.layout, self.prompts_BP.shape[1]
        cos, sin = self.policy.rotary.at(decoder.positions[:, None], width + decoder.length)
        first = layout.first_stage
        hidden_NH = self.weights.embed(tokens_N) if first else self._received(1, len(tokens_N))[0]
        hidden_NH = decoder.step(hidden_NH, cos, sin)
        if layout.last_stage:
            return self.weights.logits(hidden_NH)
        self._send(hidden_NH)
        return None

    def _received(self, *shape: int) -> Tensor:
        hidden = torch.empty(*shape, self.weights.hidden, dtype=self.policy.numerics.dtype, device=self.device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _send(self, hidden: Tensor) -> None:
        dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())

    def _choose(self, logits_NV: Tensor | None, drawn_N: Tensor, logps: Tensor, rows_N: Tensor) -> Tensor:
        """The next token of every sequence, on every stage; the last stage notes its log-probability in `logps`."""
        if logits_NV is None:
            return parallel.from_last_stage(torch.zeros(len(drawn_N), dtype=torch.long, device=self.device))
        next_N, logps_N = choose(logits_NV, drawn_N, self.sampling)
        logps.index_copy_(0, rows_N, logps_N)
        return parallel.from_last_stage(next_N)


@dataclass
class _Running:
    """Sequences that run together. rows_N: their places among all; over_N: who is done; length_N: tokens of each."""

    rows_N: Tensor
    room_N: Tensor
    states_N: Tensor
    over_N: Tensor
    stopped_N: Tensor
    length_N: Tensor
    _drawn: tuple[int, Tensor] | None = field(default=None, init=False)

    @staticmethod
    def start(rows: np.ndarray, room: np.ndarray, states: Tensor) -> _Running:
        rows_N = torch.from_numpy(rows).to(states.device)
        none = torch.zeros_like(rows_N)
        over = none.bool()
        room_N = torch.from_numpy(room[rows]).to(states.device)
        return _Running(rows_N, room_N, states[rows_N], over, over.clone(), none)

    def of(self, left: Tensor) -> _Running:
        """The sequences that go on."""
        return _Running(*(getattr(self, part.name)[left] for part in fields(self) if part.init))

    def drawn(self, place: int) -> Tensor:
        """Uniform numbers for a place, made for some places at once."""
        first = place - place % _PLACES
        if self._drawn is None or self._drawn[0] != first:
            places = torch.arange(first, first + _PLACES, device=self.states_N.device)
            self._drawn = first, uniform(self.states_N, places[:, None])
        return self._drawn[1][place - first]

    def note(self, ends_N: Tensor, place: int) -> None:
        """Every sequence that is not done has got a token."""
        self.length_N += ~self.over_N
        self.stopped_N |= ends_N & ~self.over_N
        self.over_N |= ends_N | (self.room_N <= place + 1)

    def leave(self, lengths: Tensor, stopped: Tensor) -> None:
        """Write what is known of the sequences into the lists of all."""
        lengths.index_copy_(0, self.rows_N, self.length_N)
        stopped.index_copy_(0, self.rows_N, self.stopped_N)


def choose(logits_NV: Tensor, drawn_N: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens for uniform numbers in [0, 1), and their log-probabilities; fp32 logits without padding."""
    if sampling.temperature == 0:
        logps_N, next_N = torch.log_softmax(logits_NV, -1).max(-1)
        return next_N, logps_N
    if sampling.temperature != 1:
        logits_NV = logits_NV / sampling.temperature
    if sampling.filters:
        lowest_N1 = lowest_kept(logits_NV, top_p=sampling.top_p, top_k=sampling.top_k)
        logits_NV = logits_NV.masked_fill(logits_NV < lowest_N1, -torch.inf)
    probs_NV = torch.softmax(logits_NV, -1)
    # Inverting the distribution function needs one number a token, which a counter gives in any order.
    summed_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    drawn_N1 = drawn_N[:, None] * summed_NV[:, -1:]
    next_N1 = torch.searchsorted(summed_NV, drawn_N1, right=True).clamp(max=logits_NV.shape[1] - 1)
    return next_N1.squeeze(1), probs_NV.gather(1, next_N1).log().squeeze(1)


_PLACES = 32
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


def sample_states(
    seed: int, step: int, prompt_keys: Sequence[int], samples: Sequence[int], device: torch.device
) -> Tensor:
    """Where the random numbers of each (seed, step, prompt, sample) begin, int64, a prompt's samples side by side."""
    prompt_N = torch.tensor(list(prompt_keys), dtype=torch.long, device=device).repeat_interleave(len(samples))
    sample_N = torch.tensor(list(samples), dtype=torch.long, device=device).repeat(len(prompt_keys))
    states_N = torch.zeros_like(prompt_N)
    for key in (seed, step, prompt_N, sample_N):
        states_N = _mix((states_N ^ key) + _GOLDEN)
    return states_N


def uniform(states_N: Tensor, place: int | Tensor) -> Tensor:
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
