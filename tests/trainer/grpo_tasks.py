"""GRPO steps in the test's own process: a small random policy, an environment that rewards digits, short answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from models import hf_model, megatron_section, policy_of

from nemotron_launch.trainer.data.prompts import Prompt
from nemotron_launch.trainer.environments import Rollout, Score
from nemotron_launch.trainer.generation import MegatronGenerator
from nemotron_launch.trainer.grpo_batches import Packing
from nemotron_launch.trainer.grpo_losses import GRPOLossConfig
from nemotron_launch.trainer.grpo_rollouts import Roller
from nemotron_launch.trainer.grpo_samples import SampleLog
from nemotron_launch.trainer.grpo_settings import Settings
from nemotron_launch.trainer.grpo_step import RolloutTask
from nemotron_launch.trainer.loop import LoopConfig, Progress, Step
from nemotron_launch.trainer.reference import frozen_logps
from nemotron_launch.trainer.rollouts import Sampling

PROMPTS, SAMPLES = 8, 4
STOPS = tuple(range(97, 123))  # a to z: about a tenth of the vocabulary, so that answers differ in length


def reward(rollout: Rollout) -> Score:
    """How many of an answer's characters are below 64: digits, signs and control characters."""
    return Score(float(sum(ord(letter) < 64 for letter in rollout.text)))


@dataclass
class Scored:
    """An environment of one function; keeps what it was asked."""

    of: Callable[[Rollout], Score] = reward

    def __post_init__(self) -> None:
        self.seen: list[Rollout] = []

    def check(self, rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None: ...

    def score(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        self.seen += [rollout for group in groups for rollout in group]
        return [[self.of(rollout) for rollout in group] for group in groups]

    def close(self) -> None: ...


SETTINGS = Settings(
    num_prompts_per_step=PROMPTS,
    samples=SAMPLES,
    normalize_rewards=True,
    leave_one_out=True,
    scaling=None,
    shaping=None,
    overlong_filtering=False,
    dynamic_sampling_batches=0,
    error_threshold=None,
    clip=(None, None),
    loss=GRPOLossConfig(),
    kl_period=0,
    needs_reference=True,
    global_batch=PROMPTS * SAMPLES,
    micro_batch=8,
    logprob_batch=16,
    packing=Packing(samples=SAMPLES, pad_id=256, share_prompt=True, multiple_of=1),
)


def prompts(count: int = 2 * PROMPTS) -> list[Prompt]:
    """Texts of 1 to 9 bytes."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(count):
        ids = rng.integers(65, 91, 1 + i % 9).astype(np.int32)
        made.append(Prompt(ids, [{"role": "user", "content": bytes(ids.tolist()).decode()}], {}, f"rows.jsonl:{i + 1}"))
    return made


class Task:
    """A RolloutTask with a policy of its own, ready to step."""

    def __init__(
        self,
        layout: Any,
        tokenizer: Any,
        folder: Path,
        *,
        settings: Settings = SETTINGS,
        environment: Scored | None = None,
        rows: Sequence[Prompt] | None = None,
        generation_batch: int | None = None,
        sampling: Sampling | None = None,
        max_failed: float = 0.0,
        lr: float = 1e-3,
    ) -> None:
        rows = rows or prompts()
        self.policy = policy_of(hf_model("llama"), layout)
        reference = frozen_logps(SimpleNamespace(), self.policy, None, kind="offloaded")  # type: ignore[arg-type]
        self.policy.make_trainable(megatron_section(lr=lr), total_steps=10)
        self.environment = environment or Scored()
        roller = Roller(
            MegatronGenerator(self.policy, tokenizer, batch_size=generation_batch, max_length=24),
            self.environment,  # type: ignore[arg-type]
            tokenizer,
            layout,
            seed=3,
            max_failed=max_failed,
        )
        self.task = RolloutTask(
            settings=settings,
            prompts=rows,
            sampling=sampling or Sampling(10, stop_ids=STOPS),
            roller=roller,
            reference=reference,
            validation=None,
            samples=SampleLog(folder, resume_step=0, enabled=True),
        )
        config = LoopConfig(
            global_batch=settings.num_prompts_per_step,
            total_steps=10,
            max_epochs=5,
            seed=3,
            shuffle=True,
            val_period=0,
            val_start_at=-1,
            val_at_start=False,
            val_at_end=False,
            save_optimizer=True,
            must_save_by=None,
            checkpoints=False,
        )
        self.run = SimpleNamespace(config=config, policy=self.policy)
        self.progress = Progress()

    def step(self) -> Step:
        done = self.task.step(self.run, self.progress)  # type: ignore[arg-type]
        self.progress.after(done)
        return done

    def steps(self, count: int) -> list[dict[str, float]]:
        """The metrics of some steps, but for times."""
        return [_timeless(self.step().metrics) for _ in range(count)]


def _timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("train/") and "slowest" not in name}


def with_loss(settings: Settings = SETTINGS, **changes: Any) -> Settings:
    return replace(settings, loss=replace(settings.loss, **changes))
