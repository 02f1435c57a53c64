"""Supervised fine-tuning of a policy: the step sft/megatron.

Legend: N sequences, R tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.agreement import same_everywhere, together
from nemotron_launch.trainer.batch import Batch, Group, collate
from nemotron_launch.trainer.data.sft import SFTExample, load_sft
from nemotron_launch.trainer.data.sources import data_section
from nemotron_launch.trainer.loop import Progress, Run, Step
from nemotron_launch.trainer.losses import sft_loss
from nemotron_launch.trainer.policy import LossFunction, Policy
from nemotron_launch.trainer.row_steps import row_step
from nemotron_launch.trainer.setup import Session, fingerprint, row_multiple, run_step
from nemotron_launch.trainer.start import Rows, Start, start_training
from nemotron_launch.trainer.validation import GenerationCheck, padded, shares, weighted_mean

log = logging.getLogger(__name__)
METRICS = ("loss", "num_valid_tokens")


def main(step_dir: Path, argv: list[str] | None = None) -> int:
    """Entry point of the step's train.py; returns an exit code of `exit_codes`."""
    return run_step(step_dir, run, argv)


def run(session: Session) -> int:
    """Load, warm-start or resume, train, and leave a checkpoint_megatron."""
    examples, validation = together(lambda: load_data(session))

    def train_from(begun: Start) -> int:
        policy = begun.policy()
        begun.make_trainable(policy)
        return begun.train(policy, ConversationTask(session, policy, examples, validation))

    data = same_everywhere(_fingerprint(examples), what="other rows", where="data.train")
    return start_training(session, Rows("sft", len(examples), data, "rows"), train_from)


def load_data(session: Session) -> tuple[list[SFTExample], dict[str, list[SFTExample]]]:
    """Training rows, and validation rows by the name that their metrics carry."""
    data = session.config["data"]

    def load(section: Mapping[str, object] | None, key: str, split: str) -> list[SFTExample]:
        examples, bad = load_sft(
            data_section(data, section, split=split),
            tokenizer=session.tokenizer,
            max_length=data["max_input_seq_length"] or session.config["policy"]["max_total_sequence_length"],
            step_dir=session.step_dir,
            max_bad_rows=data["max_bad_rows"],
            add_bos=data["add_bos"],
            add_eos=data["add_eos"],
            add_generation_prompt=data["add_generation_prompt"],
            key=key,
        )
        if session.main_rank and (text := bad.summary()):
            log.warning("%s: %s", key, text)
        if not examples:
            raise UserError("holds no usable row", where=key)
        return examples

    training = load(data["train"], "data.train", "train")
    validation = {}
    if data["validation"] is not None:
        validation["default"] = load(data["validation"], "data.validation", "validation")
    return training, validation


def _fingerprint(examples: Sequence[SFTExample]) -> str:
    return fingerprint(array for example in examples for array in (example.ids, example.loss_mask))


class ConversationTask:
    """The conversations of a run: their batches, losses and validations."""

    metric_names: Sequence[str] = METRICS
    advice = "lengthen policy.megatron_cfg.scheduler.lr_warmup_iters"

    def __init__(
        self,
        session: Session,
        policy: Policy,
        examples: Sequence[SFTExample],
        validation: Mapping[str, Sequence[SFTExample]],
    ) -> None:
        self.policy = policy
        self.examples = examples
        self.validation = validation
        self.section = section = session.config["sft"]
        self.pad_id = session.tokenizer.pad_id
        self.multiple_of = row_multiple(session)
        self.micro_batch = session.config["policy"]["train_micro_batch_size"]
        self.check = GenerationCheck.of(section["val_generation"], session) if validation else None

    @property
    def rows(self) -> int:
        return len(self.examples)

    def batch(self, examples: Sequence[SFTExample | None]) -> Batch:
        """Collate examples; None stands for one that only fills the batch."""
        groups = []
        for example in examples:
            taken = example or self.examples[0]
            valid = example is not None and not example.overlong
            groups.append(Group(0, (taken.ids,), valid=valid, loss_masks=(taken.loss_mask,)))
        device = self.policy.layout.device
        return collate(groups, pad_id=self.pad_id, device=device, multiple_of=self.multiple_of)

    def train_batches(self, indices: np.ndarray) -> tuple[list[Batch], LossFunction]:
        mine = shares(indices, self.policy.layout, self.micro_batch)
        batches = [self.batch([self.examples[i] for i in part]) for part in mine]
        return batches, self._loss(batches, [self.examples[i] for i in indices])

    def _loss(self, batches: Sequence[Batch], whole: Sequence[SFTExample | None]) -> LossFunction:
        """The loss of micro-batch i, normalised by the tokens of the whole global batch."""
        tokens = sum(_valid_tokens(example) for example in whole if example is not None)
        valid_tokens = torch.tensor(float(tokens), dtype=torch.float64, device=self.policy.layout.device)

        def loss(logps_NR: torch.Tensor, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return sft_loss(logps_NR, batches[i].mask_NR, valid_tokens=valid_tokens)

        return loss

    def describe(self, indices: np.ndarray) -> dict[str, float]:
        examples = [self.examples[i] for i in indices]
        lengths = [_valid_tokens(example) for example in examples]
        return {
            "tokens": float(sum(len(example.ids) for example in examples)),
            "global_valid_seqs": float(sum(not example.overlong for example in examples)),
            "global_valid_toks": float(sum(lengths)),
            "response_length_mean": float(np.mean(lengths)),
        }

    def sources(self, indices: np.ndarray) -> list[str]:
        return [self.examples[i].source for i in indices]

    def step(self, run: Run, progress: Progress) -> Step:
        return row_step(self, run, progress)

    def validate(self, step: int) -> dict[str, float]:
        """Each validation set's loss, then exact match of greedy answers for held-out prompts."""
        line: dict[str, float] = {}
        for name, examples in self.validation.items():
            values = self._validate_set(examples)
            line |= {f"validation-{name}/{key}": value for key, value in values.items()}
        if self.check and "default" in self.validation:
            held_out = [example for example in self.validation["default"] if not example.overlong]
            checked = self.check.run(
                self.policy,
                [example.ids[: example.prompt_len] for example in held_out],
                [example.ids[example.prompt_len :] for example in held_out],
                None,
            )
            line |= {f"validation-default/{key}": value for key, value in checked.items()}
        return line

    def _validate_set(self, examples: Sequence[SFTExample]) -> dict[str, float]:
        size, micro = self.section["val_global_batch_size"], self.section["val_micro_batch_size"]
        limit = self.section["val_batches"]
        results = []
        for start in list(range(0, len(examples), size))[: limit if limit > 0 else None]:
            indices = padded(np.arange(start, min(start + size, len(examples))), self.policy.layout.data * micro)
            mine = shares(indices, self.policy.layout, micro)
            batches = [self.batch([examples[i] if i >= 0 else None for i in part]) for part in mine]
            whole = [examples[i] if i >= 0 else None for i in indices]
            results.append(self.policy.evaluate(batches, self._loss(batches, whole), METRICS))
        return weighted_mean(results, "num_valid_tokens")


def _valid_tokens(example: SFTExample) -> int:
    """Tokens in the loss; nothing predicts the first of a sequence."""
    return 0 if example.overlong else int(example.loss_mask[1:].sum())
