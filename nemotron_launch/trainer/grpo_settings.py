"""What of a config a step of GRPO reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_launch.trainer.advantages import RewardScaling, RewardShaping
from nemotron_launch.trainer.grpo_batches import Packing
from nemotron_launch.trainer.grpo_losses import GRPOLossConfig
from nemotron_launch.trainer.setup import Session, row_multiple


@dataclass(frozen=True)
class Settings:
    """Mostly under the config's names."""

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
    micro_tokens: int | None = None  # with dynamic batching: tokens of a micro-batch, in place of rollouts
    logprob_tokens: int | None = None
    invalid_tool_call: float | None = None  # the advantage of answers whose tool calls cannot be read

    @staticmethod
    def of(session: Session) -> Settings:
        """From the composed config."""
        grpo, policy = session.config["grpo"], session.config["policy"]
        loss = GRPOLossConfig.of(session.config["loss_fn"])
        scaling, shaping = grpo["reward_scaling"], grpo["reward_shaping"]
        dynamic = policy["dynamic_batching"] if policy["dynamic_batching"]["enabled"] else None
        longest, micro_batch = policy["max_total_sequence_length"], policy["train_micro_batch_size"]
        logprob_batch = policy["logprob_batch_size"] or 2 * micro_batch
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
            micro_batch=micro_batch,
            logprob_batch=logprob_batch,
            micro_tokens=dynamic and (dynamic["train_mb_tokens"] or longest * micro_batch),
            logprob_tokens=dynamic and (dynamic["logprob_mb_tokens"] or longest * logprob_batch),
            packing=Packing(
                samples=grpo["num_generations_per_prompt"],
                pad_id=session.tokenizer.pad_id,
                share_prompt=policy["shared_prompt"],
                multiple_of=math.lcm(row_multiple(session), (dynamic or {}).get("sequence_length_round") or 1),
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
