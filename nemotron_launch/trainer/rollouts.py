"""What makes rollouts: one interface, engines behind it. The trainer learns from the ids sampled, never from text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nemotron_launch.trainer.generation import Completion


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_k 0 (null in a config) and top_p 1 leave the distribution whole."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


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
