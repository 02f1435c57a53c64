"""The training loop that all steps share: when to train, validate, save and stop; metrics, signals, resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import yaml

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes
from nemotron_launch.trainer.agreement import SharedError, on_rank_0
from nemotron_launch.trainer.architecture import Architecture
from nemotron_launch.trainer.checkpoints import WEIGHTS, CheckpointStore, metric_value, out_of_time, parse_must_save_by
from nemotron_launch.trainer.data.order import Position, batch_indices, next_position, steps_per_epoch
from nemotron_launch.trainer.file_errors import why_not_written
from nemotron_launch.trainer.megatron import checkpoint, parallel
from nemotron_launch.trainer.megatron.parallel import Layout
from nemotron_launch.trainer.metrics import MetricsLog
from nemotron_launch.trainer.policy import Policy
from nemotron_launch.trainer.signals import StopRequest
from nemotron_launch.trainer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Task(Protocol):
    """What differs between the steps: what one step of the loop does, and how its result is validated."""

    advice: str  # what to change first where the loss is not finite

    def step(self, run: Run, progress: Progress) -> Step:
        """Train once, from `progress`, which is the loop's to move. Ends before a loss that is not finite."""

    def validate(self, step: int) -> dict[str, float]:
        """Metrics by full name, such as `validation-default/loss`."""


@dataclass(frozen=True)
class Step:
    """What one step of the loop did.

    metrics: by full name, with `train/loss` and `train/grad_norm`. position: where the data goes on. samples: how many
    were trained on. sources: their files and lines, for messages.
    """

    metrics: dict[str, float]
    position: Position
    samples: int
    valid_tokens: int
    sources: Callable[[], list[str]]


@dataclass(frozen=True)
class LoopConfig:
    """The part of a config that rules the loop."""

    global_batch: int
    total_steps: int
    max_epochs: int
    seed: int
    shuffle: bool
    val_period: int
    val_start_at: int
    val_at_start: bool
    val_at_end: bool
    save_optimizer: bool
    must_save_by: float | None
    checkpoints: bool

    @staticmethod
    def of(config: Mapping[str, Any], section: str, rows: int) -> LoopConfig:
        """From a composed config; section is dpo, sft, rm or grpo. total_steps is the lesser of steps and epochs.

        GRPO's batches are prompts; with dynamic sampling a step may take several, and the epochs end before.
        """
        part, saving = config[section], config["checkpointing"]
        global_batch, key = config["policy"]["train_global_batch_size"], "policy.train_global_batch_size"
        if section == "grpo":
            key = "grpo.num_prompts_per_step"
            global_batch = int(part["num_prompts_per_step"] * part["batch_multiplier"])
        in_epoch = steps_per_epoch(rows, global_batch, drop_last=True, key=key)
        must = saving["checkpoint_must_save_by"]
        return LoopConfig(
            global_batch=global_batch,
            total_steps=min(part["max_num_steps"], part["max_num_epochs"] * in_epoch),
            max_epochs=part["max_num_epochs"],
            seed=part["seed"],
            shuffle=config["data"]["shuffle"],
            val_period=part["val_period"],
            val_start_at=part.get("val_start_at", -1),
            val_at_start=part["val_at_start"],
            val_at_end=part["val_at_end"],
            save_optimizer=saving["save_optimizer"],
            must_save_by=parse_must_save_by(must),
            checkpoints=saving["enabled"],
        )

    def over(self, progress: Progress) -> bool:
        """Whether nothing is left to do."""
        return progress.step >= self.total_steps or progress.position.epoch >= self.max_epochs


@dataclass
class Progress:
    """Where a run stands; what training_info.json keeps."""

    step: int = 0
    position: Position = field(default_factory=Position)
    consumed_samples: int = 0
    total_valid_tokens: int = 0

    @staticmethod
    def from_info(info: Mapping[str, Any]) -> Progress:
        position = Position.from_dict(info)
        return Progress(info["step"], position, info["consumed_samples"], info["total_valid_tokens"])

    def after(self, done: Step) -> None:
        """Move on behind a step."""
        self.step += 1
        self.position = done.position
        self.consumed_samples += done.samples
        self.total_valid_tokens += done.valid_tokens


@dataclass(frozen=True)
class Run:
    """What the loop works with, set up by the step.

    save_tensors: writes a checkpoint's tensors into its folder; None is megatron-core's way. All ranks call it.
    """

    config: LoopConfig
    policy: Policy | Trained
    task: Task
    store: CheckpointStore
    metrics: MetricsLog
    stop: StopRequest
    tokenizer: Tokenizer
    composed: Mapping[str, Any]
    recorded: Mapping[str, Any]
    started: float
    save_tensors: Callable[[Path], None] | None = None


class Trained(Protocol):
    """What is trained, where it is no policy of megatron-core's: a reward model."""

    layout: Layout
    architecture: Architecture
    gpt: torch.nn.Module

    def train_step(self, batches: Sequence[Any], loss: Any, metric_names: Sequence[str]) -> dict[str, float]:
        """One optimizer step, as Policy's."""


def visiting_order(config: LoopConfig, rows: int, *, position: Position, steps: int) -> list[np.ndarray]:
    """The global batches of the next `steps` steps from a position."""
    batches = []
    for _ in range(steps):
        batches.append(batch_at(config, rows, position))
        position = next_position(position, rows, config.global_batch, drop_last=True)
    return batches


def batch_at(config: LoopConfig, rows: int, position: Position) -> np.ndarray:
    """The row indices of the global batch at a position."""
    return batch_indices(
        rows,
        seed=config.seed,
        epoch=position.epoch,
        step_in_epoch=position.step_in_epoch,
        batch=config.global_batch,
        shuffle=config.shuffle,
        drop_last=True,
    )


def train(run: Run, progress: Progress) -> int:
    """Train from `progress` to the last step; returns an exit code of `exit_codes`.

    Raises UserError (exit code 1) where loss, gradient or weights are not finite: nothing of that step is saved.
    """
    config, task = run.config, run.task
    if config.val_at_start and progress.step == 0:
        line = task.validate(0)
        _rank_value(run, line)
        run.metrics.log(0, 0, line)
    first, began = progress.step, time.monotonic()
    with run.metrics.progress(config.total_steps, first):
        while not config.over(progress):
            if progress.step == first and run.stop.agree(False, first):
                log.info("asked to stop before step %d (exit code %d)", first + 1, exit_codes.RESUME_ME)
                return exit_codes.RESUME_ME
            epoch, done = progress.position.epoch, task.step(run, progress)
            line = dict(done.metrics)
            not_finite = [name for name in ("loss", "grad_norm") if not math.isfinite(line[f"train/{name}"])]
            _stop_if(not_finite, progress.step + 1, run, done)
            progress.after(done)
            last = config.over(progress)
            due = config.val_period > 0 and progress.step % config.val_period == 0
            if (due and progress.step >= config.val_start_at) or (last and config.val_at_end):
                line |= task.validate(progress.step)
            _rank_value(run, line)
            must_stop = _must_stop(run, (time.monotonic() - began) / (progress.step - first), progress.step)
            # Before the checkpoint: a run that resumes from it then misses no line.
            run.metrics.log(progress.step, epoch, line)
            if config.checkpoints and run.store.should_save(progress.step, last=last, stopping=must_stop):
                _stop_if(_not_finite(run.policy, line), progress.step, run, done)
                save(run, progress, line)
            if must_stop and not last:
                ready = "ready to resume" if config.checkpoints else "nothing saved (checkpointing.enabled is false)"
                log.info("stopped after step %d, %s (exit code %d)", progress.step, ready, exit_codes.RESUME_ME)
                return exit_codes.RESUME_ME
    return exit_codes.FINISHED


def _must_stop(run: Run, mean_step_s: float, step: int) -> bool:
    """Whether all ranks save and stop after this step: a signal came, or the time to save by is near."""
    elapsed = time.monotonic() - run.started
    return run.stop.agree(out_of_time(elapsed, mean_step_s, run.config.must_save_by), step)


def _not_finite(policy: Policy | Trained, line: Mapping[str, float]) -> list[str]:
    """What makes a checkpoint worthless although the step's own loss was fine; the same on every rank."""
    bad = [name for name, value in line.items() if name.endswith("/loss") and not math.isfinite(value)]
    here = any(not bool(torch.isfinite(weight).all()) for weight in policy.gpt.parameters())
    return [*bad, "weights"] if parallel.any_rank(here, policy.layout.device) else bad


def _stop_if(not_finite: Sequence[str], step: int, run: Run, done: Step) -> None:
    """End the run where something is not finite, the same on every rank, naming the step and its rows."""
    if not not_finite:
        return
    sources = done.sources()
    shown = ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if sources[8:] else "")
    good = run.store.latest()
    raise SharedError(
        f"step {step}: {' and '.join(not_finite)} not finite",
        hint=f"rows of the batch: {shown}\n"
        f"last good checkpoint: {good or 'none'}\n"
        f"{run.task.advice}, lower policy.megatron_cfg.optimizer.lr, or look at these rows",
        exit_code=exit_codes.FAILED,
    )


def save(run: Run, progress: Progress, line: Mapping[str, float]) -> None:
    """Write step_N: tensors by all ranks into tmp_step_N, the rest and the rename by rank 0."""
    began = time.monotonic()
    store, step = run.store, progress.step
    folder = store.tmp_path(step)

    def begin() -> None:
        run.metrics.sync()
        store.begin(step)
        (folder / (WEIGHTS if run.save_tensors is None else "policy")).mkdir(parents=True)

    on_rank_0(begin)
    try:
        if run.save_tensors is not None:
            run.save_tensors(folder)
        else:
            _save_policy(cast(Policy, run.policy), folder / WEIGHTS, keep=run.config.save_optimizer)
    except checkpoint.WRITE_ERRORS as error:
        raise _not_written(error, run, step) from error
    on_rank_0(lambda: _commit(run, progress, line))
    log.info("saved step %d in %.1f s", step, time.monotonic() - began)


def _save_policy(policy: Policy, weights: Path, *, keep: bool) -> None:
    checkpoint.save(weights, policy.gpt, policy.optimizer if keep else None, policy.scheduler if keep else None)


def _commit(run: Run, progress: Progress, line: Mapping[str, float]) -> None:
    folder = run.store.tmp_path(progress.step)
    try:
        run.policy.architecture.write(folder / "policy")
        run.tokenizer.save(folder / "policy" / "tokenizer")
        text = yaml.safe_dump(dict(run.composed), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        (folder / "train_dataloader.json").write_text(json.dumps(progress.position.to_dict()) + "\n")
        run.store.commit(progress.step, training_info(run, progress, line))
    except OSError as error:
        raise _not_written(error, run, progress.step) from error
    run.store.prune()


def _not_written(error: BaseException, run: Run, step: int) -> UserError:
    """The save broke off: give its room back, and say why and where the run stands."""
    reason = why_not_written(error, run.store.folder)
    if run.policy.layout.rank == 0:
        shutil.rmtree(run.store.tmp_path(step), ignore_errors=True)
    return UserError(
        f"step {step} could not be saved: {reason}",
        where=str(run.store.folder),
        hint=f"last good checkpoint: {run.store.latest() or 'none'}; start again to go on from there",
        exit_code=exit_codes.FAILED,
    )


def _rank_value(run: Run, line: Mapping[str, float]) -> float | None:
    """The metric by which this step's checkpoint will be ranked; UserError, at once, where there is none such."""
    return metric_value(run.store.metric_name, train=_of_train(line), val=_of_validation(line))


def _of_train(line: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("train/"): value for name, value in line.items() if name.startswith("train/")}


def _of_validation(line: Mapping[str, float]) -> dict[str, float]:
    # NeMo-RL's names: `validation-default/loss` is `validation-default_loss` there, `validation/accuracy` `accuracy`.
    return {
        name.removeprefix("validation/").replace("/", "_"): value
        for name, value in line.items()
        if name.startswith(("validation-", "validation/"))
    }


def training_info(run: Run, progress: Progress, line: Mapping[str, float]) -> dict[str, Any]:
    """training_info.json: NeMo-RL's fields, the step's metrics by their checkpointing names, and what resume checks."""
    if run.store.metric_name and _rank_value(run, line) is None:
        log.warning("step %d has no %s: its checkpoint ranks last", progress.step, run.store.metric_name)
    return {
        "epoch": progress.position.epoch,
        "step": progress.step,
        "total_steps": run.config.total_steps,
        "step_in_epoch": progress.position.step_in_epoch,
        "consumed_samples": progress.consumed_samples,
        "total_valid_tokens": progress.total_valid_tokens,
        "save_optimizer": run.config.save_optimizer,
        "tokenizer": run.tokenizer.fingerprint,
        **run.recorded,
        **{f"train:{name}": value for name, value in _of_train(line).items()},
        **{f"val:{name}": value for name, value in _of_validation(line).items()},
    }


def resume(policy: Policy, folder: Path, info: Mapping[str, Any]) -> None:
    """Restore weights, optimizer and schedule from a checkpoint of this run."""
    weights = folder / WEIGHTS
    if info["save_optimizer"]:
        checkpoint.load_training_state(weights, policy.gpt, policy.optimizer, policy.scheduler)
    else:
        log.warning("%s holds no optimizer state: Adam starts afresh", folder)
        checkpoint.load_weights(weights, policy.gpt)
        policy.optimizer.reload_model_params()
        policy.scheduler.step(info["step"])
