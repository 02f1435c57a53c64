"""Which rows make which batch: a pure function of seed and position, so that resuming needs two numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nemotron_launch.errors import UserError


@dataclass(frozen=True)
class Position:
    """The batch that comes next: epoch and step within it, both from 0. An epoch's end is (epoch + 1, 0)."""

    epoch: int = 0
    step_in_epoch: int = 0

    def to_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step_in_epoch": self.step_in_epoch}

    @staticmethod
    def from_dict(state: Mapping[str, int]) -> Position:
        return Position(int(state["epoch"]), int(state["step_in_epoch"]))


def steps_per_epoch(n: int, batch: int, *, drop_last: bool, key: str = "policy.train_global_batch_size") -> int:
    """Batches that n rows make. Raises UserError, naming `key`, if they make none."""
    steps = n // batch if drop_last else -(-n // batch)
    if not steps:
        raise UserError(
            f"{n} rows do not fill one batch of {batch}", where=key, hint="give more rows, or a smaller batch"
        )
    return steps


def next_position(position: Position, n: int, batch: int, *, drop_last: bool) -> Position:
    """The position behind one more batch."""
    step = position.step_in_epoch + 1
    if step >= steps_per_epoch(n, batch, drop_last=drop_last):
        return Position(position.epoch + 1, 0)
    return Position(position.epoch, step)


def batch_indices(
    n: int, *, seed: int, epoch: int, step_in_epoch: int, batch: int, shuffle: bool, drop_last: bool
) -> np.ndarray:
    """Row indices (int64) of one global batch, the same for every process, layout and resume.

    Every epoch has its own permutation, made once and kept while it is in use. The last batch of an epoch is shorter
    where drop_last is off. Raises IndexError beyond the epoch's end.
    """
    steps = steps_per_epoch(n, batch, drop_last=drop_last)
    if not 0 <= step_in_epoch < steps:
        raise IndexError(f"step {step_in_epoch} of an epoch of {steps}")
    span = slice(step_in_epoch * batch, min((step_in_epoch + 1) * batch, n))
    if not shuffle:
        return np.arange(span.start, span.stop, dtype=np.int64)
    return _permutation(n, seed, epoch)[span]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw draws, not Generator.permutation: numpy promises the raw stream of a bit generator for all versions.
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    order = np.argsort(draws, kind="stable")
    order.setflags(write=False)
    return order
