"""Training of a reward model on preference pairs: the step rm/hf.

It starts from a policy's weights (any that policies start from) with a new head that gives one score, and leaves
Hugging Face sequence-classification folders. Computed by transformers, data-parallel.

Legend: B conversations (rows alternate chosen, rejected), M pairs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.errors import UserError
from nemotron_launch.trainer import hf, warm_start
from nemotron_launch.trainer.agreement import on_rank_0, together
from nemotron_launch.trainer.architecture import hf_config
from nemotron_launch.trainer.data.preference import PreferencePair
from nemotron_launch.trainer.loop import Progress, Run, Step
from nemotron_launch.trainer.losses import bradley_terry_loss
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.megatron.optimizer import build_scheduler
from nemotron_launch.trainer.pairs import counts, load_data, rows_of
from nemotron_launch.trainer.policy import LossFunction, Policy
from nemotron_launch.trainer.reward_models import HF_FOLDER, RewardModel
from nemotron_launch.trainer.row_steps import row_step
from nemotron_launch.trainer.setup import DTYPES, Session, numerics, run_step
from nemotron_launch.trainer.start import Start, start_training
from nemotron_launch.trainer.validation import padded, shares, weighted_mean

log = logging.getLogger(__name__)
METRICS = ("loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean", "num_valid_samples")
OPTIMIZER = "optimizer.pt"
HEADS = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}


def main(step_dir: Path, argv: list[str] | None = None) -> int:
    """Entry point of the step's train.py; returns an exit code of `exit_codes`."""
    return run_step(step_dir, run, argv)


def run(session: Session) -> int:
    """Load, warm-start or resume, train, and leave a checkpoint_hf in every step_N."""
    pairs, validation = together(lambda: load_data(session))

    def train_from(begun: Start) -> int:
        model = TrainedRewardModel(session, total_steps=begun.loop.total_steps)
        if begun.found:
            model.resume(*begun.found)
            begun.say_resumed()
        else:
            model.start_from(begun.weights)
        keep = begun.loop.save_optimizer
        task = PairTask(session, model, pairs, validation)
        return begun.train(model, task, save_tensors=lambda folder: model.save(folder, optimizer=keep))

    return start_training(session, rows_of(pairs, "rm"), train_from)


class TrainedRewardModel:
    """A reward model with its optimizer: weights in fp32, computed under autocast where the precision is bfloat16."""

    def __init__(self, session: Session, *, total_steps: int) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        self.layout, self.architecture = session.layout, session.architecture
        self.session = session
        policy = session.config["policy"]
        self.dtype = DTYPES[policy["precision"]]
        # As transformers writes it: it then finds the same architecture again.
        values = hf_config(self.architecture) | {"architectures": [HEADS[self.architecture.family]], "num_labels": 1}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        torch.manual_seed(session.config["rm"]["seed"])
        model = AutoModelForSequenceClassification.from_config(config)
        if policy["megatron_cfg"]["activation_checkpointing"]:
            model.gradient_checkpointing_enable()
        self.scorer = RewardModel(
            model.float().train(), session.tokenizer, self.layout.device, max_length=policy["max_total_sequence_length"]
        )
        self.gpt: torch.nn.Module = self.scorer.model
        section = policy["megatron_cfg"]["optimizer"]
        self.clip = section["clip_grad"]
        self.optimizer = torch.optim.AdamW(
            _decayed(self.gpt),
            lr=section["lr"],
            betas=(section["adam_beta1"], section["adam_beta2"]),
            eps=section["adam_eps"],
            weight_decay=section["weight_decay"],
            fused=True,
        )
        self.scheduler = build_scheduler(self.optimizer, policy["megatron_cfg"], total_steps=total_steps)

    @torch.no_grad()
    def start_from(self, start: warm_start.WarmStart) -> None:
        """The weights of a policy, whatever it starts from; the head stays as the seed drew it."""
        policy = Policy(
            self.architecture,
            self.layout,
            dataclasses.replace(numerics(self.session.config), dtype=torch.float32),
            seed=self.session.config["rm"]["seed"],
        )
        warm_start.load(policy, start)
        own = dict(self.gpt.named_parameters())
        for name, value in hf.export_weights(policy.gpt, self.architecture):
            if name != "lm_head.weight":
                own.pop(name).copy_(value)
        assert set(own) == {"score.weight"}, f"no weights for {', '.join(own)}"

    def scores(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """[B], fp32."""
        if self.dtype == torch.float32:
            return self.scorer.scores(sequences)
        with torch.autocast(self.layout.device.type, dtype=self.dtype):
            return self.scorer.scores(sequences)

    def train_step(
        self, batches: Sequence[Sequence[np.ndarray]], loss: LossFunction, metric_names: Sequence[str]
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; as Policy.train_step."""
        self.optimizer.zero_grad()
        collected = []
        for i, sequences in enumerate(batches):
            value, metrics = loss(self.scores(sequences), i)
            value.backward()
            collected.append(metrics)
        values = self.reduce(collected, metric_names)
        group = self.optimizer.param_groups[0]
        values |= {"lr": group["lr"], "wd": group["weight_decay"], "grad_norm": math.nan}
        if math.isfinite(values["loss"]):  # a bad loss must not reach the weights
            for parameter in self.gpt.parameters():
                if parameter.grad is not None:
                    parallel.sum_over_data(parameter.grad)
            norm = torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), self.clip or math.inf)
            values["grad_norm"] = float(norm)
            if math.isfinite(values["grad_norm"]):
                self.optimizer.step()
        self.scheduler.step(1)
        return values

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[Sequence[np.ndarray]], loss: LossFunction, metric_names: Sequence[str]
    ) -> dict[str, float]:
        """The loss's metrics without a step."""
        self.gpt.eval()
        try:
            return self.reduce([loss(self.scores(part), i)[1] for i, part in enumerate(batches)], metric_names)
        finally:
            self.gpt.train()

    def reduce(self, collected: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, float]:
        """Metrics summed over micro-batches and data-parallel ranks."""
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.layout.device)
        for metrics in collected:
            totals += torch.stack([metrics[name].to(totals) for name in names])
        return dict(zip(names, parallel.sum_over_data(totals).tolist(), strict=True))

    def save(self, folder: Path, *, optimizer: bool) -> None:
        """step_N/hf, a Hugging Face folder with its tokenizer, and the optimizer's state; by rank 0."""

        def write() -> None:
            state = {name: value.detach().to(self.dtype) for name, value in self.gpt.state_dict().items()}
            self.scorer.model.config.dtype = self.dtype
            self.scorer.model.save_pretrained(folder / HF_FOLDER, state_dict=state)
            self.session.tokenizer.save(folder / HF_FOLDER)
            if optimizer:
                kept: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
                if self.dtype != torch.float32:
                    kept["weights"] = self.gpt.state_dict()  # those beside it are rounded
                torch.save(kept, folder / OPTIMIZER)

        on_rank_0(write)

    def resume(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Weights, optimizer and schedule as a checkpoint of this run has them."""
        from safetensors.torch import load_file

        path = folder / OPTIMIZER
        kept: dict[str, Any] = {}
        try:
            if info["save_optimizer"]:
                kept = torch.load(path, map_location=self.layout.device, weights_only=True)
            if "weights" in kept:
                self.gpt.load_state_dict(kept["weights"])
            else:
                path = folder / HF_FOLDER
                for file in sorted(path.glob("*.safetensors")):
                    self.gpt.load_state_dict(load_file(file), strict=False)
        except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot be read: {first}", where=str(path), exit_code=1) from error
        if kept:
            self.optimizer.load_state_dict(kept["optimizer"])
        else:
            log.warning("%s holds no optimizer state: Adam starts afresh", folder)
        self.scheduler.step(info["step"])


def _decayed(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups as megatron-core makes them: no weight decay for biases and norms."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "wd_mult": 1.0}, {"params": others, "wd_mult": 0.0}]


class PairTask:
    """The pairs of a run: their batches, losses and validations."""

    metric_names: Sequence[str] = METRICS
    advice = "lengthen policy.megatron_cfg.scheduler.lr_warmup_iters"

    def __init__(
        self,
        session: Session,
        model: TrainedRewardModel,
        pairs: Sequence[PreferencePair],
        validation: Mapping[str, Sequence[PreferencePair]],
    ) -> None:
        self.model = model
        self.pairs = pairs
        self.validation = validation
        self.section = session.config["rm"]
        self.micro_batch = session.config["policy"]["train_micro_batch_size"]

    @property
    def rows(self) -> int:
        return len(self.pairs)

    def train_batches(self, indices: np.ndarray) -> tuple[list[list[np.ndarray]], LossFunction]:
        pairs: list[PreferencePair | None] = [self.pairs[i] for i in indices]
        mine = [[self.pairs[i] for i in part] for part in shares(indices, self.model.layout, self.micro_batch)]
        return [_sequences(part, self.pairs[0]) for part in mine], self._loss(mine, pairs)

    def _loss(
        self, mine: Sequence[Sequence[PreferencePair | None]], whole: Sequence[PreferencePair | None]
    ) -> LossFunction:
        """The loss of micro-batch i, normalised by the valid pairs of the whole global batch."""
        device = self.model.layout.device
        valid_pairs = torch.tensor(float(sum(map(_counts, whole))), device=device)

        def loss(scores_B: Tensor, i: int) -> tuple[Tensor, dict[str, Tensor]]:
            valid_M = torch.tensor([_counts(pair) for pair in mine[i]], device=device)
            return bradley_terry_loss(scores_B, valid_M, valid_pairs=valid_pairs)

        return loss

    def describe(self, indices: np.ndarray) -> dict[str, float]:
        return counts([self.pairs[i] for i in indices])

    def sources(self, indices: np.ndarray) -> list[str]:
        return [self.pairs[i].source for i in indices]

    def step(self, run: Run, progress: Progress) -> Step:
        return row_step(self, run, progress)

    def validate(self, step: int) -> dict[str, float]:
        """Each validation set's loss, accuracy and mean scores."""
        return {
            f"validation-{name}/{key}": value
            for name, pairs in self.validation.items()
            for key, value in self._validate_set(pairs).items()
        }

    def _validate_set(self, pairs: Sequence[PreferencePair]) -> dict[str, float]:
        size, micro = self.section["val_global_batch_size"], self.section["val_micro_batch_size"]
        limit, layout = self.section["val_batches"], self.model.layout
        results = []
        for start in list(range(0, len(pairs), size))[: limit if limit > 0 else None]:
            indices = padded(np.arange(start, min(start + size, len(pairs))), layout.data * micro)
            whole = [pairs[i] if i >= 0 else None for i in indices]
            mine = [[pairs[i] if i >= 0 else None for i in part] for part in shares(indices, layout, micro)]
            batches = [_sequences(part, pairs[0]) for part in mine]
            results.append(self.model.evaluate(batches, self._loss(mine, whole), METRICS))
        return weighted_mean(results, "num_valid_samples")


def _counts(pair: PreferencePair | None) -> bool:
    return pair is not None and not pair.overlong


def _sequences(pairs: Sequence[PreferencePair | None], filler: PreferencePair) -> list[np.ndarray]:
    """Chosen and rejected of each pair in turn; None stands for one that only fills the batch."""
    return [ids for pair in pairs for ids in ((pair or filler).chosen_ids, (pair or filler).rejected_ids)]
