"""Direct preference optimization of a policy: the step rl/nemo_rl/dpo.

Legend: M pairs, N = 2·M sequences (chosen and rejected alternate), R answer tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import exit_codes, warm_start
from nemotron_launch.trainer.agreement import same_everywhere, together
from nemotron_launch.trainer.batch import Batch, Group, collate
from nemotron_launch.trainer.data.preference import PreferencePair, load_preferences
from nemotron_launch.trainer.data.sources import data_section
from nemotron_launch.trainer.loop import LoopConfig, Progress, Run, Step, resume, train
from nemotron_launch.trainer.losses import DPOWeights, dpo_loss
from nemotron_launch.trainer.policy import LossFunction, Policy
from nemotron_launch.trainer.reference import Reference, open_reference
from nemotron_launch.trainer.row_steps import row_step
from nemotron_launch.trainer.setup import (
    Session,
    checkpoint_to_resume,
    find_start,
    fingerprint,
    new_policy,
    open_metrics,
    row_multiple,
    run_step,
    say_finished,
)
from nemotron_launch.trainer.validation import GenerationCheck, padded, shares, weighted_mean

log = logging.getLogger(__name__)
METRICS = (
    "loss",
    "preference_loss",
    "sft_loss",
    "accuracy",
    "policy_accuracy",
    "rewards_chosen_mean",
    "rewards_rejected_mean",
    "num_valid_samples",
)


def main(step_dir: Path, argv: list[str] | None = None) -> int:
    """Entry point of the step's train.py; returns an exit code of `exit_codes`."""
    return run_step(step_dir, run, argv)


def run(session: Session) -> int:
    """Load, warm-start or resume, train, and leave an aligned checkpoint_megatron."""
    config = session.config
    pairs, validation = together(lambda: load_data(session))
    loop = LoopConfig.of(config, "dpo", len(pairs))
    data = same_everywhere(_fingerprint(pairs), what="other rows", where="data.train")
    found = checkpoint_to_resume(session, data=data)
    progress = Progress.from_info(found[1]) if found else Progress()
    start = find_start(session, found[1]["warm_start"] if found else None, again=True)
    with open_metrics(session, progress.step) as metrics:
        if found and loop.over(progress):
            return say_finished(session, found[0], progress.step, loop.total_steps, limit="dpo.max_num_steps")
        log.info("%d training pairs, %d steps of %d", len(pairs), loop.total_steps, loop.global_batch)
        policy = new_policy(session)
        warm_start.load(policy, start)
        task = PreferenceTask(session, policy, pairs, validation)
        task.reference = open_reference(session, policy, start, task, loop)
        if session.stop.stop_step is not None:
            return exit_codes.RESUME_ME
        policy.make_trainable(config["policy"]["megatron_cfg"], total_steps=loop.total_steps)
        if found:
            resume(policy, *found)
            log.info("resumed from %s", found[0])
        setup = Run(
            config=loop,
            policy=policy,
            task=task,
            store=session.store,
            metrics=metrics,
            stop=session.stop,
            tokenizer=session.tokenizer,
            composed=config,
            recorded={"warm_start": start.recorded(), "data": data},
            started=session.started,
        )
        return train(setup, progress)


def load_data(session: Session) -> tuple[list[PreferencePair], dict[str, list[PreferencePair]]]:
    """Training pairs, and validation pairs by the name that their metrics carry."""
    data = session.config["data"]

    def load(section: Mapping[str, object] | None, key: str, split: str) -> list[PreferencePair]:
        pairs, bad = load_preferences(
            data_section(data, section, split=split),
            tokenizer=session.tokenizer,
            max_length=data["max_input_seq_length"] or session.config["policy"]["max_total_sequence_length"],
            step_dir=session.step_dir,
            max_bad_rows=data["max_bad_rows"],
            key=key,
        )
        if session.main_rank and (text := bad.summary()):
            log.warning("%s: %s", key, text)
        if not pairs:
            raise UserError("holds no usable pair", where=key)
        return pairs

    training = load(data["train"], "data.train", "train")
    validation = {}
    if data["validation"]:
        validation["default"] = load(data["validation"], "data.validation", "validation")
    for name, path in (data["val_data_paths"] or {}).items():
        validation[name] = load({"data_path": path}, f"data.val_data_paths.{name}", "train")
    return training, validation


def _fingerprint(pairs: Sequence[PreferencePair]) -> str:
    return fingerprint(array for pair in pairs for array in (pair.chosen_ids, pair.rejected_ids))


class PreferenceTask:
    """The pairs of a run: their batches, losses and validations."""

    metric_names: Sequence[str] = METRICS
    advice = "raise dpo.reference_policy_kl_penalty"
    reference: Reference

    def __init__(
        self,
        session: Session,
        policy: Policy,
        pairs: Sequence[PreferencePair],
        validation: Mapping[str, Sequence[PreferencePair]],
    ) -> None:
        self.policy = policy
        self.pairs = pairs
        self.validation = validation
        self.section = section = session.config["dpo"]
        self.pad_id = session.tokenizer.pad_id
        self.share_prompt = session.config["policy"]["shared_prompt"]
        self.multiple_of = row_multiple(session)
        self.micro_batch = session.config["policy"]["train_micro_batch_size"]
        self.logprob_batch = session.config["policy"]["logprob_batch_size"] or 2 * self.micro_batch
        self.weights = DPOWeights(
            reference_policy_kl_penalty=section["reference_policy_kl_penalty"],
            preference_loss_weight=section["preference_loss_weight"],
            sft_loss_weight=section["sft_loss_weight"],
            preference_average_log_probs=section["preference_average_log_probs"],
            sft_average_log_probs=section["sft_average_log_probs"],
        )
        self.check = GenerationCheck.of(section["val_generation"], session) if validation else None

    @property
    def rows(self) -> int:
        return len(self.pairs)

    def batch(self, pairs: Sequence[PreferencePair | None]) -> Batch:
        """Collate pairs; None stands for a pair that only fills the batch."""
        filler = next(pair for pair in pairs if pair is not None) if any(pairs) else self.pairs[0]
        groups = [
            Group((pair or filler).prompt_len, _both(pair or filler), valid=pair is not None and not pair.overlong)
            for pair in pairs
        ]
        return collate(
            groups,
            pad_id=self.pad_id,
            device=self.policy.layout.device,
            share_prompt=self.share_prompt,
            multiple_of=self.multiple_of,
        )

    def train_batches(self, indices: np.ndarray) -> tuple[list[Batch], LossFunction]:
        pairs = [self.pairs[i] for i in indices]
        mine = shares(indices, self.policy.layout, self.micro_batch)
        batches = [self.batch([self.pairs[i] for i in part]) for part in mine]
        references = self.reference.training(mine, batches)
        return batches, self._loss(batches, references, pairs)

    def _loss(
        self,
        batches: Sequence[Batch],
        references: Sequence[torch.Tensor],
        all_pairs: Sequence[PreferencePair | None],
    ) -> LossFunction:
        """The loss of micro-batch i, normalised by the valid pairs of the whole global batch."""
        valid = sum(pair is not None and not pair.overlong for pair in all_pairs)
        valid_pairs = torch.tensor(float(valid), dtype=torch.float64, device=self.policy.layout.device)

        def loss(logps_NR: torch.Tensor, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            batch = batches[i]
            return dpo_loss(
                logps_NR, references[i], batch.mask_NR, batch.valid_G, self.weights, valid_pairs=valid_pairs
            )

        return loss

    def describe(self, indices: np.ndarray) -> dict[str, float]:
        pairs = [self.pairs[i] for i in indices]
        valid = [pair for pair in pairs if not pair.overlong]
        chosen = [len(pair.chosen_answer) for pair in valid]
        rejected = [len(pair.rejected_answer) for pair in valid]
        return {
            "tokens": float(sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)),
            "global_valid_seqs": 2.0 * len(valid),
            "global_valid_toks": float(sum(chosen) + sum(rejected)),
            "chosen_length_mean": float(np.mean(chosen)) if chosen else 0.0,
            "rejected_length_mean": float(np.mean(rejected)) if rejected else 0.0,
        }

    def sources(self, indices: np.ndarray) -> list[str]:
        return [self.pairs[i].source for i in indices]

    def step(self, run: Run, progress: Progress) -> Step:
        return row_step(self, run, progress)

    def validate(self, step: int) -> dict[str, float]:
        """Each validation set's loss and accuracies, then what the policy writes for held-out prompts."""
        line: dict[str, float] = {}
        for name, pairs in self.validation.items():
            values = self._validate_set(name, pairs)
            line |= {f"validation-{name}/{key}": value for key, value in values.items()}
        if self.check and "default" in self.validation:
            held_out = self.validation["default"]
            checked = self.check.run(
                self.policy,
                [pair.prompt_ids for pair in held_out if not pair.overlong],
                [pair.chosen_answer for pair in held_out if not pair.overlong],
                self.reference,
            )
            line |= {f"validation-default/{key}": value for key, value in checked.items()}
        return line

    def _validate_set(self, name: str, pairs: Sequence[PreferencePair]) -> dict[str, float]:
        size, micro = self.section["val_global_batch_size"], self.section["val_micro_batch_size"]
        limit = self.section["val_batches"]
        starts = range(0, len(pairs), size)
        results = []
        for start in list(starts)[: limit if limit > 0 else None]:
            indices = padded(np.arange(start, min(start + size, len(pairs))), self.policy.layout.data * micro)
            whole = [pairs[i] if i >= 0 else None for i in indices]
            mine = shares(indices, self.policy.layout, micro)
            batches = [self.batch([pairs[i] if i >= 0 else None for i in part]) for part in mine]
            references = self.reference.validation(name, mine, batches)
            results.append(self.policy.evaluate(batches, self._loss(batches, references, whole), METRICS))
        return weighted_mean(results, "num_valid_samples")


def _both(pair: PreferencePair) -> tuple[np.ndarray, np.ndarray]:
    return pair.chosen_ids, pair.rejected_ids
