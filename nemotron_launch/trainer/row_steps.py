"""A step of SFT, DPO and reward models: one optimizer step on one batch of rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nemotron_launch.trainer.data.order import next_position
from nemotron_launch.trainer.loop import Progress, Run, Step, Trained, batch_at
from nemotron_launch.trainer.memory import peak_memory
from nemotron_launch.trainer.policy import LossFunction, Policy


class RowTask(Protocol):
    """Rows that are trained on as they are."""

    metric_names: Sequence[str]

    @property
    def rows(self) -> int:
        """How many training samples there are."""

    def train_batches(self, indices: np.ndarray) -> tuple[list[Any], LossFunction]:
        """This rank's micro-batches of one global batch, and the loss that is normalised by the whole of it."""

    def describe(self, indices: np.ndarray) -> dict[str, float]:
        """Metrics of a global batch that need no model: lengths, tokens. `tokens` is the count of all of them."""

    def sources(self, indices: np.ndarray) -> list[str]:
        """File and line of each sample, for messages."""


def row_step(task: RowTask, run: Run, progress: Progress) -> Step:
    """One optimizer step on the rows that come next."""
    config, policy = run.config, run.policy
    indices = batch_at(config, task.rows, progress.position)
    began = time.monotonic()
    batches, loss = task.train_batches(indices)
    values = policy.train_step(batches, loss, task.metric_names)
    elapsed = time.monotonic() - began
    batch = task.describe(indices)
    metrics = {f"train/{name}": value for name, value in (values | batch).items() if name != "tokens"}
    return Step(
        metrics=metrics | _timing(batch, elapsed, policy),
        position=next_position(progress.position, task.rows, config.global_batch, drop_last=True),
        samples=len(indices),
        valid_tokens=int(batch["global_valid_toks"]),
        sources=lambda: task.sources(indices),
    )


def _timing(batch: Mapping[str, float], elapsed: float, policy: Policy | Trained) -> dict[str, float]:
    processes = policy.layout.data * policy.layout.tensor * policy.layout.pipeline
    return {
        "timing/train/total_step_time": elapsed,
        "timing/train/tokens_per_sec": batch["tokens"] / elapsed,
        "timing/train/valid_tokens_per_sec_per_gpu": batch["global_valid_toks"] / elapsed / processes,
        **peak_memory(policy.layout.device),
    }
