"""What makes rollouts: one interface, engines behind it. The trainer learns from the ids sampled, never from text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_k 0 (null in a config) and top_p 1 leave the distribution whole.

    The logits are divided by the temperature; of these the top_k highest are kept, and of their distribution the
    likeliest tokens up to a total probability of top_p, the one that passes it included. A tie with the last token kept
    is kept too. So is the distribution in which log-probabilities are recorded and trained on.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out of the distribution."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)

    @property
    def whole(self) -> Sampling:
        """The same without top_p and top_k: what a KL to the reference is taken of, since it must be finite."""
        return replace(self, top_p=1.0, top_k=0)


@dataclass(frozen=True)
class Completion:
    """What the policy wrote behind one prompt: ids with the stop token, if it came, and their log-probabilities.

    logps: nats, fp32, under the distribution that was sampled from (greedy: at temperature 1). stopped: by a stop
    token or a stop string; otherwise it ran out of room.
    """

    ids: np.ndarray
    logps: np.ndarray
    stopped: bool


class Generator(Protocol):
    """An engine. Random numbers are keyed by (seed, step, prompt, sample, position), so batches do not matter."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        samples: int,
        seed: int,
        step: int,
        prompt_keys: Sequence[int],
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in prompt order. All ranks of one replica call it with the same."""

    def refresh(self) -> None:
        """Take over the policy's current weights. In the same process there is nothing to do."""

    def close(self) -> None: ...


def answer_text(decode: Callable[[Iterable[int]], str], completion: Completion, sampling: Sampling) -> str:
    """The completion's text as a reader sees it: without its stop token, and cut where a stop string begins."""
    ids = completion.ids
    if completion.stopped and len(ids) and int(ids[-1]) in sampling.stop_ids:
        ids = ids[:-1]
    text = decode(ids)
    found = [place for place in (text.find(stop) for stop in sampling.stop_strings) if place >= 0]
    return text[: min(found)] if found else text
