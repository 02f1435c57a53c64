"""How every step's training begins: resume or warm start, and what the loop gets of it; the step brings its task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.trainer import warm_start
from nemotron_launch.trainer.loop import LoopConfig, Progress, Run, Task, Trained, resume, train
from nemotron_launch.trainer.metrics import MetricsLog
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.setup import (
    Session,
    checkpoint_to_resume,
    find_start,
    new_policy,
    open_metrics,
    say_finished,
)
from nemotron_launch.trainer.warm_start import WarmStart

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What a run trains on. section: the config's part that rules the loop. fingerprint: the same on every rank.

    named, step: for its log, what the rows are, and what a step takes where it is not just the global batch.
    """

    section: str
    count: int
    fingerprint: str
    named: str
    step: str = ""


@dataclass(frozen=True)
class Start:
    """A run that is about to train. found: the checkpoint that it resumes from, with its training_info.

    weights: those of the first step. reference: whether the step needs them although the run resumes.
    """

    session: Session
    loop: LoopConfig
    progress: Progress
    weights: WarmStart
    reference: bool
    found: tuple[Path, Mapping[str, Any]] | None
    metrics: MetricsLog
    data: str

    def policy(self) -> Policy:
        """A policy that has the weights of the first step, unless a resumed run has no use for them."""
        policy = new_policy(self.session)
        if self.reference or not self.found:
            warm_start.load(policy, self.weights)
        return policy

    def make_trainable(self, policy: Policy) -> None:
        """Give the policy its optimizer and, where the run resumes, all that its checkpoint holds."""
        policy.make_trainable(self.session.config["policy"]["megatron_cfg"], total_steps=self.loop.total_steps)
        if self.found:
            resume(policy, *self.found)
            self.say_resumed()

    def say_resumed(self) -> None:
        if self.found:
            log.info("resumed from %s", self.found[0])

    def train(self, policy: Policy | Trained, task: Task, *, save_tensors: Callable[[Path], None] | None = None) -> int:
        """Train to the last step; returns an exit code of `exit_codes`. save_tensors: as `Run` has it."""
        session = self.session
        run = Run(
            config=self.loop,
            policy=policy,
            task=task,
            store=session.store,
            metrics=self.metrics,
            stop=session.stop,
            tokenizer=session.tokenizer,
            composed=session.config,
            recorded={"warm_start": self.weights.recorded(), "data": self.data},
            started=session.started,
            save_tensors=save_tensors,
        )
        return train(run, self.progress)


def start_training(session: Session, rows: Rows, train_from: Callable[[Start], int], *, reference: bool = False) -> int:
    """Find where the run stands and let the step train from there; returns an exit code of `exit_codes`.

    reference: whether the step compares with the weights of the first step. Raises UserError where the run cannot go
    on: what decides the result has changed, or the weights are not to be had.
    """
    loop = LoopConfig.of(session.config, rows.section, rows.count)
    found = checkpoint_to_resume(session, data=rows.fingerprint)
    progress = Progress.from_info(found[1]) if found else Progress()
    weights = find_start(session, found[1]["warm_start"] if found else None, again=reference)
    with open_metrics(session, progress.step) as metrics:
        if found and loop.over(progress):
            limit = f"{rows.section}.max_num_steps"
            return say_finished(session, found[0], progress.step, loop.total_steps, limit=limit)
        size = rows.step or loop.global_batch
        log.info("%d training %s, %d steps of %s", rows.count, rows.named, loop.total_steps, size)
        return train_from(Start(session, loop, progress, weights, reference, found, metrics, rows.fingerprint))
