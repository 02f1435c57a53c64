"""One step of GRPO: from the prompts that come next to one or more optimizer steps.

Legend: B rollouts of the step (those of one prompt in a row), N rollouts of a micro-batch, R their tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.trainer import exit_codes
from nemotron_launch.trainer.advantages import (
    RewardScaling,
    RewardShaping,
    advantages,
    clip_advantages,
    group_ids,
    group_statistics,
    not_truncated,
    scale_rewards,
    set_advantages,
    shape_rewards,
    varied,
)
from nemotron_launch.trainer.agreement import SharedError
from nemotron_launch.trainer.data.order import Position, next_position
from nemotron_launch.trainer.data.prompts import Prompt
from nemotron_launch.trainer.grpo_batches import MicroBatch, Packing, micro_batches, own_share
from nemotron_launch.trainer.grpo_losses import METRICS, GRPOLossConfig, grpo_loss, kl_in_advantages
from nemotron_launch.trainer.grpo_metrics import (
    advantage_metrics,
    length_metrics,
    reward_metrics,
    sequence_error_metrics,
    sequence_errors,
)
from nemotron_launch.trainer.grpo_rollouts import Roller, Rollouts, score_metrics
from nemotron_launch.trainer.grpo_samples import SampleLog, best_and_worst
from nemotron_launch.trainer.grpo_validation import Validation
from nemotron_launch.trainer.loop import LoopConfig, Progress, Run, Step, batch_at
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.policy import LossFunction, Policy
from nemotron_launch.trainer.reference import Score
from nemotron_launch.trainer.rollouts import Sampling
from nemotron_launch.trainer.setup import Session, row_multiple

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What of a config a step reads, under the config's names."""

    num_prompts_per_step: int
    samples: int
    normalize_rewards: bool
    leave_one_out: bool
    scaling: RewardScaling | None
    shaping: RewardShaping | None
    overlong_filtering: bool
    dynamic_sampling_batches: int  # 0: off
    error_threshold: float | None
    clip: tuple[float | None, float | None]
    loss: GRPOLossConfig
    kl_period: int
    needs_reference: bool
    global_batch: int
    micro_batch: int
    logprob_batch: int
    packing: Packing
    invalid_tool_call: float | None = None  # the advantage of answers whose tool calls cannot be read

    @staticmethod
    def of(session: Session) -> Settings:
        grpo, policy = session.config["grpo"], session.config["policy"]
        loss = GRPOLossConfig.of(session.config["loss_fn"])
        scaling, shaping = grpo["reward_scaling"], grpo["reward_shaping"]
        kl_period = 0 if grpo["skip_reference_policy_logprobs_calculation"] else grpo["reference_kl_period"]
        return Settings(
            num_prompts_per_step=grpo["num_prompts_per_step"],
            samples=grpo["num_generations_per_prompt"],
            normalize_rewards=grpo["normalize_rewards"],
            leave_one_out=grpo["use_leave_one_out_baseline"],
            scaling=RewardScaling(**_without_enabled(scaling)) if scaling["enabled"] else None,
            shaping=RewardShaping(**_without_enabled(shaping)) if shaping["enabled"] else None,
            overlong_filtering=grpo["overlong_filtering"],
            dynamic_sampling_batches=grpo["dynamic_sampling_max_gen_batches"] if grpo["use_dynamic_sampling"] else 0,
            error_threshold=grpo["seq_logprob_error_threshold"],
            clip=(grpo["advantage_clip_low"], grpo["advantage_clip_high"]),
            loss=loss,
            kl_period=kl_period,
            needs_reference=bool(loss.reference_policy_kl_penalty or kl_period),
            global_batch=policy["train_global_batch_size"],
            micro_batch=policy["train_micro_batch_size"],
            logprob_batch=policy["logprob_batch_size"] or 2 * policy["train_micro_batch_size"],
            packing=Packing(
                samples=grpo["num_generations_per_prompt"],
                pad_id=session.tokenizer.pad_id,
                share_prompt=policy["shared_prompt"],
                multiple_of=row_multiple(session),
            ),
            invalid_tool_call=grpo["invalid_tool_call_advantage"],
        )

    @property
    def updates(self) -> int:
        """Optimizer steps on the rollouts of a step."""
        return self.num_prompts_per_step * self.samples // self.global_batch

    @property
    def needs_previous(self) -> bool:
        """Whether the policy before the step differs from the one that is trained, or is wanted before it is."""
        return self.updates > 1 or self.error_threshold is not None or self.loss.use_kl_in_reward


def _without_enabled(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "enabled"}


@dataclass(frozen=True)
class Batch:
    """A step's rollouts and what every rank has made of them.

    rewards_B: as scored; shaped_B: what advantages are made of. sample_mask_B: 0 leaves a rollout out of the loss.
    token_advantages: with the KL in the reward, of each token of this rank's rollouts, by their places.
    """

    rollouts: Rollouts
    groups_B: Tensor
    rewards_B: Tensor
    shaped_B: Tensor
    sample_mask_B: Tensor
    advantages_B: Tensor
    token_advantages: Mapping[int, Tensor] | None = None


@dataclass
class RolloutTask:
    """Rollouts of a run's prompts, what is learnt from them, and validation."""

    settings: Settings
    prompts: Sequence[Prompt]
    sampling: Sampling
    roller: Roller
    reference: Score | None
    validation: Validation | None
    samples: SampleLog
    advice: str = "raise loss_fn.reference_policy_kl_penalty"
    stale: bool = True  # whether the generator lacks the newest weights

    def validate(self, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        self._refresh()
        return self.validation.run(self.roller, step, self.samples)

    def step(self, run: Run, progress: Progress) -> Step:
        """Rollouts, then training on them."""
        began = time.monotonic()
        self._refresh()
        seconds: dict[str, float] = {}
        rollouts, position, sampled = self._collect(run.config, progress)
        batch = self._judged(rollouts)
        waited = time.monotonic()
        previous, reference, batch, errors = self._logps(run.policy, batch, progress.step + 1)
        seconds["logprobs"] = time.monotonic() - waited
        waited = time.monotonic()
        values = self._train(run.policy, batch, previous, reference)
        self.stale = True
        seconds["policy_training"] = time.monotonic() - waited
        if rollouts.texts:
            places = best_and_worst(rollouts)
            self.samples.write(progress.step + 1, "train", rollouts, places)
        if reference is None:
            values = {name: value for name, value in values.items() if name not in ("kl_penalty", "reference_kl")}
        metrics = {f"train/{name}": value for name, value in (values | sampled | errors | _described(batch)).items()}
        seconds |= {**rollouts.seconds, "total_step_time": time.monotonic() - began}
        lengths_B = rollouts.lengths_B
        valid_tokens = int((lengths_B * batch.sample_mask_B).sum())
        return Step(
            metrics=metrics | _timing(seconds, metrics, lengths_B, valid_tokens, run.policy),
            position=position,
            samples=len(rollouts),
            valid_tokens=valid_tokens,
            sources=lambda: list(dict.fromkeys(prompt.source for prompt in rollouts.prompts)),
        )

    def _refresh(self) -> None:
        if self.stale:
            self.roller.generator.refresh()
            self.stale = False

    # -- rollouts ----------------------------------------------------------------------------------------------

    def _collect(self, config: LoopConfig, progress: Progress) -> tuple[Rollouts, Position, dict[str, float]]:
        """A step's scored rollouts, where the data goes on, and what was sampled for them.

        With dynamic sampling: batches of prompts are answered until enough groups differ in their rewards.
        """
        settings = self.settings
        position, kept, batches, all_rewards = progress.position, None, 0, []
        want = settings.num_prompts_per_step * settings.samples
        while True:
            indices = batch_at(config, len(self.prompts), position)
            rolled = self.roller.roll(
                [self.prompts[i] for i in indices],
                # A number of its own for each visit of each prompt: a step may cross the end of an epoch.
                (position.epoch * len(self.prompts) + indices).tolist(),
                step=progress.step + 1,
                samples=settings.samples,
                sampling=self.sampling,
            )
            position = next_position(position, len(self.prompts), config.global_batch, drop_last=True)
            batches += 1
            all_rewards.append(rolled.rewards_B[rolled.known_B])
            if not settings.dynamic_sampling_batches:
                return rolled, position, {}
            chosen = rolled.take(torch.nonzero(self._differs(rolled)).flatten().tolist())
            kept = chosen if kept is None else kept.plus(chosen)
            if len(kept) >= want:
                break
            if batches >= settings.dynamic_sampling_batches:
                groups = len(kept) // settings.samples
                raise SharedError(
                    f"step {progress.step + 1}: after {batches} batches of rollouts {groups} groups differ in their "
                    f"rewards, and a step needs {settings.num_prompts_per_step}",
                    where="grpo.use_dynamic_sampling",
                    hint="take easier or harder prompts, raise grpo.num_generations_per_prompt or "
                    "grpo.dynamic_sampling_max_gen_batches, or turn it off",
                    exit_code=exit_codes.FAILED,
                )
        found = {
            "dynamic_sampling_num_gen_batches": float(batches),
            "unfiltered_reward": float(torch.cat(all_rewards).mean()),
            "dynamic_sampling_discarded": float(len(kept) - want),
        }
        return kept.take(range(want)), position, found

    def _differs(self, rollouts: Rollouts) -> Tensor:
        """[B]: whether the rollout's group teaches anything, by rewards not yet shaped."""
        rewards_B = self._scaled(rollouts.rewards_B)
        groups_B = group_ids([prompt.ids for prompt in rollouts.prompts])
        _, stds_B = group_statistics(rewards_B, groups_B, leave_one_out=False, votes_B=rollouts.known_B)
        return varied(stds_B)

    def _scaled(self, rewards_B: Tensor) -> Tensor:
        return scale_rewards(rewards_B, self.settings.scaling) if self.settings.scaling else rewards_B

    def _judged(self, rollouts: Rollouts) -> Batch:
        """Rewards scaled and shaped, compared within their groups, and who counts."""
        settings = self.settings
        rewards_B, truncated_B, known_B = rollouts.rewards_B, rollouts.truncated_B, rollouts.known_B
        shaped_B = self._scaled(rewards_B)
        if settings.shaping:
            shaped_B = shape_rewards(shaped_B, rollouts.lengths_B, truncated_B, settings.shaping)
        groups_B = group_ids([prompt.ids for prompt in rollouts.prompts])
        baselines_B, stds_B = group_statistics(
            shaped_B, groups_B, leave_one_out=settings.leave_one_out, votes_B=known_B
        )
        advantages_B = advantages(shaped_B, baselines_B, stds_B, normalize=settings.normalize_rewards)
        advantages_B = set_advantages(advantages_B, rollouts.invalid_calls_B, settings.invalid_tool_call)
        sample_mask_B = known_B.float()
        if settings.overlong_filtering:
            sample_mask_B = sample_mask_B * not_truncated(truncated_B)
        if not settings.loss.use_kl_in_reward:  # else they are clipped when they are complete
            advantages_B = clip_advantages(advantages_B, *settings.clip)
        return Batch(rollouts, groups_B, rewards_B, shaped_B, sample_mask_B, advantages_B)

    # -- log-probabilities -------------------------------------------------------------------------------------

    def _logps(
        self, policy: Policy, batch: Batch, step: int
    ) -> tuple[dict[int, Tensor] | None, dict[int, Tensor] | None, Batch, dict[str, float]]:
        """What the policy before the step and the reference say of this rank's rollouts, by their places.

        None where it is not needed. The batch comes back without the sequences on which generator and trainer differ
        too much.
        """
        settings = self.settings
        mine = self._mine(policy, len(batch.rollouts))
        wants_kl = settings.kl_period and (step == 1 or step % settings.kl_period == 0)
        wants_reference = settings.loss.reference_policy_kl_penalty or wants_kl
        if not settings.needs_previous and not wants_reference:
            return None, None, batch, {}
        cut = micro_batches(batch.rollouts, mine, settings.logprob_batch, settings.packing, policy.layout.device)
        previous = reference = None
        errors: dict[str, float] = {}
        if settings.needs_previous:
            scored = policy.logps([part.batch for part in cut], self.sampling)
            previous = _by_place(cut, scored)
            if settings.error_threshold is not None:
                batch, errors = self._without_errors(policy, batch, cut, scored)
        if wants_reference:
            assert self.reference is not None
            said = self.reference([part.batch for part in cut], self.sampling.whole)
            reference = _by_place(cut, said)
            if settings.loss.use_kl_in_reward:
                if self.sampling.filters:
                    scored = policy.logps([part.batch for part in cut], self.sampling.whole)
                batch = replace(batch, token_advantages=self._less_kl(batch, cut, scored, said))
        return previous, reference, batch, errors

    def _mine(self, policy: Policy, count: int) -> np.ndarray:
        """Places of the rollouts that this rank trains on, over all optimizer steps of the step."""
        size = self.settings.global_batch
        starts = range(0, count, size)
        return np.concatenate([own_share(np.arange(start, start + size), policy.layout) for start in starts])

    def _without_errors(
        self, policy: Policy, batch: Batch, cut: Sequence[MicroBatch], scored: Sequence[Tensor]
    ) -> tuple[Batch, dict[str, float]]:
        """grpo.seq_logprob_error_threshold: leave out what the generator found much more or less likely."""
        device = policy.layout.device
        errors_B = torch.zeros(len(batch.rollouts), dtype=torch.float64, device=device)
        for part, logps_NR in zip(cut, scored, strict=True):
            gen_NR = part.beside(_generated(batch.rollouts, part))
            errors_B[torch.from_numpy(part.places).to(device)] = sequence_errors(logps_NR, gen_NR, part.batch.mask_NR)
        errors_B = parallel.sum_over_data(errors_B).cpu()
        before_B = batch.sample_mask_B
        assert self.settings.error_threshold is not None
        after_B = before_B * (errors_B <= self.settings.error_threshold)
        found = sequence_error_metrics(errors_B, before_B, after_B, batch.rewards_B)
        return replace(batch, sample_mask_B=after_B), found

    def _less_kl(
        self, batch: Batch, cut: Sequence[MicroBatch], scored: Sequence[Tensor], said: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """loss_fn.use_kl_in_reward: each token's advantage less its KL to the reference, then clipped."""
        reduced = [
            kl_in_advantages(
                batch.advantages_B[torch.from_numpy(part.places)].to(logps_NR),
                logps_NR,
                ref_NR,
                part.batch.mask_NR,
                config=self.settings.loss,
            )
            for part, logps_NR, ref_NR in zip(cut, scored, said, strict=True)
        ]
        return _by_place(cut, [clip_advantages(one, *self.settings.clip) for one in reduced])

    # -- training ----------------------------------------------------------------------------------------------

    def _train(
        self,
        policy: Policy,
        batch: Batch,
        previous: Mapping[int, Tensor] | None,
        reference: Mapping[int, Tensor] | None,
    ) -> dict[str, float]:
        """One optimizer step for each global batch of the rollouts; their metrics' means (extremes, sums of counts)."""
        settings = self.settings
        results = []
        for update in range(settings.updates):
            places = np.arange(update * settings.global_batch, (update + 1) * settings.global_batch)
            cut = micro_batches(
                batch.rollouts,
                own_share(places, policy.layout),
                settings.micro_batch,
                settings.packing,
                policy.layout.device,
            )
            values = policy.train_step(
                [part.batch for part in cut],
                self._loss(batch, places, cut, previous, reference),
                METRICS,
                self.sampling,
                tick=update + 1 == settings.updates,
            )
            results.append(values)
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                break
        return _together(results)

    def _loss(
        self,
        batch: Batch,
        places: np.ndarray,
        cut: Sequence[MicroBatch],
        previous: Mapping[int, Tensor] | None,
        reference: Mapping[int, Tensor] | None,
    ) -> LossFunction:
        """The loss of micro-batch i, normalised by all ranks' rollouts of the optimizer step (`places`)."""
        device = cut[0].batch.mask_NR.device
        lengths_B = batch.rollouts.lengths_B[places]
        mask_B = batch.sample_mask_B[places]
        right_B = (batch.rewards_B > 0).float()
        valid_tokens, valid_sequences, positive_tokens = (
            value.double().sum().to(device)
            for value in (lengths_B * mask_B, mask_B, lengths_B * mask_B * right_B[places])
        )
        sample_mask_B, advantages_B = batch.sample_mask_B.to(device), batch.advantages_B.to(device)
        reduced = batch.token_advantages

        def loss(logps_NR: Tensor, i: int) -> tuple[Tensor, dict[str, Tensor]]:
            part = cut[i]
            own = torch.from_numpy(part.places).to(device)
            whole_NR = None
            if logps_NR.dim() == 3:  # with top-p or top-k: in what was sampled from, and in the whole distribution
                logps_NR, whole_NR = logps_NR
            return grpo_loss(
                logps_NR,
                logps_NR.detach() if previous is None else part.beside([previous[place] for place in part.places]),
                part.beside(_generated(batch.rollouts, part)),
                None if reference is None else part.beside([reference[place] for place in part.places]),
                advantages_B[own] if reduced is None else part.beside([reduced[place] for place in part.places]),
                part.batch.mask_NR,
                sample_mask_B[own],
                config=self.settings.loss,
                valid_tokens=valid_tokens,
                valid_sequences=valid_sequences,
                positive_B=right_B.to(device)[own],
                positive_tokens=positive_tokens,
                whole_logps_BS=whole_NR,
            )

        return loss


def _generated(rollouts: Rollouts, part: MicroBatch) -> list[Tensor]:
    """The generator's own log-probabilities of each answer."""
    return [torch.from_numpy(np.asarray(rollouts.completions[i].logps, np.float32)) for i in part.places]


def _by_place(cut: Sequence[MicroBatch], scored: Sequence[Tensor]) -> dict[int, Tensor]:
    return {
        int(place): values
        for part, logps_NR in zip(cut, scored, strict=True)
        for place, values in zip(part.places, part.apart(logps_NR), strict=True)
    }


COUNTS = ("num_valid_samples",)


def _together(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one."""

    def one(name: str, values: list[float]) -> float:
        if name in COUNTS:
            return sum(values)
        if name.endswith(("_min", "_max")):
            return min(values) if name.endswith("_min") else max(values)
        return sum(values) / len(values)

    return {name: one(name, [result[name] for result in results]) for name in results[0]}


def _described(batch: Batch) -> dict[str, float]:
    """Metrics of the rollouts that need no model."""
    rollouts, known_B = batch.rollouts, batch.rollouts.known_B
    lengths_B, mask_B = rollouts.lengths_B, batch.sample_mask_B
    return {
        **(reward_metrics(batch.rewards_B[known_B], batch.groups_B[known_B]) if known_B.any() else {}),
        **length_metrics(lengths_B, rollouts.prompt_lengths_B, rollouts.truncated_B),
        **advantage_metrics(batch.advantages_B, lengths_B, mask_B),
        **score_metrics(rollouts),
        "filtered_reward": float(batch.shaped_B[known_B].mean()) if known_B.any() else math.nan,
        "global_valid_seqs": float(mask_B.sum()),
        "global_valid_toks": float((lengths_B * mask_B).sum()),
        "avg_turns_per_sample": 1.0,
    }


def _timing(
    seconds: Mapping[str, float], metrics: Mapping[str, float], lengths_B: Tensor, valid_tokens: int, policy: Policy
) -> dict[str, float]:
    layout = policy.layout
    processes = layout.data * layout.tensor * layout.pipeline
    total = seconds["total_step_time"]
    timing = {f"timing/train/{name}": value for name, value in seconds.items()} | {
        "timing/train/tokens_per_sec": metrics["train/total_num_tokens"] / total,
        "timing/train/generation_tokens_per_sec": float(lengths_B.sum()) / max(seconds["generation"], 1e-9),
        "timing/train/valid_tokens_per_sec_per_gpu": valid_tokens / total / processes,
    }
    if layout.device.type == "cuda":
        timing["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return timing
