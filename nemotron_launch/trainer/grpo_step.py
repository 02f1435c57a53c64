"""One step of GRPO: from the prompts that come next to one or more optimizer steps.

Legend: B rollouts of the step (those of one prompt in a row), N rollouts of a micro-batch, R their tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nemotron_launch.trainer import exit_codes
from nemotron_launch.trainer.advantages import (
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
from nemotron_launch.trainer.grpo_batches import MicroBatch, micro_batches, own_share
from nemotron_launch.trainer.grpo_losses import METRICS, grpo_loss, kl_in_advantages
from nemotron_launch.trainer.grpo_metrics import advantage_metrics, sequence_error_metrics, sequence_errors
from nemotron_launch.trainer.grpo_report import described, rewarded, timing, together
from nemotron_launch.trainer.grpo_rollouts import Roller, Rollouts
from nemotron_launch.trainer.grpo_samples import SampleLog, best_and_worst
from nemotron_launch.trainer.grpo_settings import Settings
from nemotron_launch.trainer.grpo_validation import Validation
from nemotron_launch.trainer.loop import LoopConfig, Progress, Run, Step, batch_at
from nemotron_launch.trainer.megatron import parallel
from nemotron_launch.trainer.policy import LossFunction, Policy
from nemotron_launch.trainer.reference import Score
from nemotron_launch.trainer.rollouts import Sampling

log = logging.getLogger(__name__)
# Steps in a row that teach nothing before it is said.
DULL = 3


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
    dull_steps: int = 0  # in a row, without a group whose rewards differ

    def validate(self, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        self._refresh()
        return self.validation.run(self.roller, step, self.samples)

    def step(self, run: Run, progress: Progress) -> Step:
        """Rollouts, then training on them."""
        began = time.monotonic()
        policy = run.policy
        assert isinstance(policy, Policy)
        self._refresh()
        seconds: dict[str, float] = {}
        rollouts, position, sampled = self._collect(run.config, progress)
        self._say_if_dull(progress.step + 1, sampled)
        batch = self._judged(rollouts)
        waited = time.monotonic()
        previous, reference, batch, errors = self._logps(policy, batch, progress.step + 1)
        seconds["logprobs"] = time.monotonic() - waited
        waited = time.monotonic()
        values = self._train(policy, batch, previous, reference)
        self.stale = True
        seconds["policy_training"] = time.monotonic() - waited
        if rollouts.texts:
            self.samples.write(progress.step + 1, "train", rollouts, best_and_worst(rollouts))
        if reference is None:
            values = {name: value for name, value in values.items() if name not in ("kl_penalty", "reference_kl")}
        lengths_B, mask_B = rollouts.lengths_B, batch.sample_mask_B
        line = values | sampled | errors | described(rollouts, batch.shaped_B, mask_B)
        line |= advantage_metrics(batch.advantages_B, lengths_B, mask_B)
        seconds |= {**rollouts.seconds, "total_step_time": time.monotonic() - began}
        times = timing(
            seconds,
            tokens=line["total_num_tokens"],
            sampled=line["sampled_tokens"],
            valid=line["global_valid_toks"],
            layout=run.policy.layout,
        )
        return Step(
            metrics={f"train/{name}": value for name, value in line.items()} | times,
            position=position,
            samples=len(rollouts),
            valid_tokens=int(line["global_valid_toks"]),
            sources=lambda: list(dict.fromkeys(prompt.source for prompt in rollouts.prompts)),
        )

    def _say_if_dull(self, step: int, sampled: Mapping[str, float]) -> None:
        """Say, the third time in a row, that there is nothing to learn from."""
        alike = sampled.get("groups_without_variance") == 1
        self.dull_steps = self.dull_steps + 1 if alike else 0
        if self.dull_steps == DULL:
            log.warning(
                "step %d: for %d steps now all answers to a prompt have had the same reward (%g on average): nothing "
                "is learnt. nemotron steps probe shows the rewards; take easier or harder prompts, or another reward",
                step, DULL, sampled["reward"],
            )  # fmt: skip

    def _refresh(self) -> None:
        if self.stale:
            self.roller.generator.refresh()
            self.stale = False

    # -- rollouts ----------------------------------------------------------------------------------------------

    def _collect(self, config: LoopConfig, progress: Progress) -> tuple[Rollouts, Position, dict[str, float]]:
        """A step's scored rollouts, where the data goes on, and metrics of all that was sampled for them.

        With dynamic sampling: batches of prompts are answered until enough groups differ in their rewards.
        """
        settings = self.settings
        position, kept, everything, batches = progress.position, None, None, 0
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
            if not settings.dynamic_sampling_batches:
                return rolled, position, rewarded(rolled)
            everything = rolled if everything is None else everything.plus(rolled)
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
            "dynamic_sampling_num_discarded_valid_samples": float(len(kept) - want),
        }
        return replace(kept.take(range(want)), seconds=everything.seconds), position, rewarded(everything) | found

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
        cut = micro_batches(
            batch.rollouts,
            mine,
            settings.logprob_batch,
            settings.packing,
            policy.layout.device,
            tokens=settings.logprob_tokens,
        )
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
                tokens=settings.micro_tokens,
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
        return together(results)

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
