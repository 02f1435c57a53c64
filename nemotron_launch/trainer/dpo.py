"""Direct preference optimization of a policy: the step rl/nemo_rl/dpo.

Legend: M pairs, N = 2·M sequences (chosen and rejected alternate), R answer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from nemotron_launch.trainer import exit_codes
from nemotron_launch.trainer.agreement import together
from nemotron_launch.trainer.batch import Batch, Group, collate
from nemotron_launch.trainer.data.preference import PreferencePair
from nemotron_launch.trainer.loop import Progress, Run, Step
from nemotron_launch.trainer.losses import DPOWeights, dpo_loss
from nemotron_launch.trainer.pairs import counts, load_data, rows_of
from nemotron_launch.trainer.policy import LossFunction, Policy
from nemotron_launch.trainer.reference import Reference, open_reference
from nemotron_launch.trainer.row_steps import row_step
from nemotron_launch.trainer.setup import Session, row_multiple, run_step
from nemotron_launch.trainer.start import Start, start_training
from nemotron_launch.trainer.validation import GenerationCheck, padded, shares, weighted_mean

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
    pairs, validation = together(lambda: load_data(session))

    def train_from(begun: Start) -> int:
        policy = begun.policy()
        task = PreferenceTask(session, policy, pairs, validation)
        task.reference = open_reference(session, policy, begun.weights, task, begun.loop)
        if session.stop.stop_step is not None:
            return exit_codes.RESUME_ME
        begun.make_trainable(policy)
        return begun.train(policy, task)

    return start_training(session, rows_of(pairs, "dpo"), train_from, reference=True)


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
        return counts(pairs) | {
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
