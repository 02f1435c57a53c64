"""The cross-checks of the steps that make rollouts (rlvr, rlhf): groups, batches, loss, generation, servers.

What scores the rollouts is checked in checks_rewards.py. Between them they find, before anything runs, what the
manifests call an error and a config can show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from nemotron_launch.config.checks_policy import (
    Problem,
    check_batch,
    check_checkpointing,
    check_lengths,
    check_metric,
    check_policy,
    data_parallel_size,
)
from nemotron_launch.config.checks_rewards import check_rewards, validates


def check_grpo(data: dict[str, Any]) -> Iterator[Problem]:
    """Every problem of a composed config with rollouts, in the order of its sections."""
    yield from _groups(data["grpo"])
    yield from _shaping(data)
    yield from _loss(data)
    yield from check_policy(data, "grpo")
    yield from _batches(data)
    yield from check_lengths(data)
    yield from _generation(data)
    yield from check_rewards(data)
    yield from check_checkpointing(data)
    periods = ("val_period", "val_at_start", "val_at_end")
    sets = ["default"] if validates(data) else []
    yield from check_metric(data, "grpo", sets=sets, periods=periods, example="accuracy")
    yield from _services(data)


def _groups(grpo: dict[str, Any]) -> Iterator[Problem]:
    size, others = grpo["num_generations_per_prompt"], grpo["use_leave_one_out_baseline"]
    key = "grpo.num_generations_per_prompt"
    if size == 1:
        yield Problem(key, "1 rollout has no others to be compared with; every advantage would be 0", f"set {key}=8")
    elif size == 2 and others and grpo["normalize_rewards"]:
        yield Problem(
            key,
            "with 2 rollouts and a leave-one-out baseline the others are one, whose deviation is 0: "
            "grpo.normalize_rewards would do nothing",
            f"set {key} to 4 or more, or grpo.use_leave_one_out_baseline=false",
        )
    if grpo["use_dynamic_sampling"] and others:
        yield Problem(
            "grpo.use_leave_one_out_baseline",
            "with grpo.use_dynamic_sampling it drops the only right rollout of a group, whose others do not differ",
            "set grpo.use_leave_one_out_baseline=false",
        )
    more = grpo["batch_multiplier"]
    if more != 1 and not grpo["use_dynamic_sampling"]:
        yield Problem(
            "grpo.batch_multiplier",
            f"{more:g} is read only with grpo.use_dynamic_sampling",
            "set grpo.use_dynamic_sampling=true, or grpo.batch_multiplier=1",
        )
    elif (prompts := grpo["num_prompts_per_step"] * more) != int(prompts):
        yield Problem(
            "grpo.batch_multiplier",
            f"{more:g} x grpo.num_prompts_per_step={grpo['num_prompts_per_step']} is no whole number of prompts",
            "choose another multiplier",
        )
    low, high = grpo["advantage_clip_low"], grpo["advantage_clip_high"]
    if low is not None and high is not None and low >= high:
        yield Problem("grpo.advantage_clip_low", f"{low:g} is not below grpo.advantage_clip_high={high:g}", "lower it")


def _shaping(data: dict[str, Any]) -> Iterator[Problem]:
    shaping, scaling = data["grpo"]["reward_shaping"], data["grpo"]["reward_scaling"]
    buffer, longest = shaping["overlong_buffer_length"], shaping["max_response_length"]
    if shaping["enabled"] and buffer >= longest:
        yield Problem(
            "grpo.reward_shaping.overlong_buffer_length",
            f"{buffer} is not less than grpo.reward_shaping.max_response_length={longest}: all would be too long",
            "lower it",
        )
    if scaling["enabled"] and scaling["source_min"] >= scaling["source_max"]:
        yield Problem(
            "grpo.reward_scaling.source_min",
            f"{scaling['source_min']:g} is not below grpo.reward_scaling.source_max={scaling['source_max']:g}",
            "give the range in which the rewards lie",
        )


def _loss(data: dict[str, Any]) -> Iterator[Problem]:
    loss = data["loss_fn"]
    if loss["sequence_level_importance_ratios"] and loss["token_level_loss"]:
        yield Problem(
            "loss_fn.token_level_loss",
            "true, but loss_fn.sequence_level_importance_ratios (GSPO) averages each sequence",
            "set loss_fn.token_level_loss=false",
        )
    yield from _alternatives(loss)
    kind, cap = loss["truncated_importance_sampling_type"], loss["truncated_importance_sampling_ratio"]
    if kind is None and cap is not None:
        yield Problem(
            "loss_fn.truncated_importance_sampling_ratio",
            f"{cap:g} is read only with a type",
            "set loss_fn.truncated_importance_sampling_type=tis, or remove it",
        )
    if kind is not None and not loss["use_importance_sampling_correction"]:
        yield Problem(
            "loss_fn.truncated_importance_sampling_type",
            f"{kind} limits a correction that is off",
            "set loss_fn.use_importance_sampling_correction=true, or the type to null",
        )
    if kind == "seq-mask-tis" and loss["sequence_level_importance_ratios"]:
        yield Problem(
            "loss_fn.truncated_importance_sampling_type",
            "seq-mask-tis weighs tokens; loss_fn.sequence_level_importance_ratios (GSPO) gives a sequence one weight",
            "set it to tis or icepop, or loss_fn.sequence_level_importance_ratios=false",
        )
    if kind is not None and cap is None:
        yield Problem(
            "loss_fn.truncated_importance_sampling_ratio",
            f"{kind} needs a limit",
            "set loss_fn.truncated_importance_sampling_ratio, for example to 5",
        )
    floor = loss["truncated_importance_sampling_ratio_min"]
    if kind in ("icepop", "seq-mask-tis") and floor is None:
        yield Problem(
            "loss_fn.truncated_importance_sampling_ratio_min",
            f"{kind} needs a lower limit too",
            "set loss_fn.truncated_importance_sampling_ratio_min, for example to 0.5",
        )
    elif floor is not None and kind is None:
        yield Problem(
            "loss_fn.truncated_importance_sampling_ratio_min",
            f"{floor:g} is read only with a type",
            "set loss_fn.truncated_importance_sampling_type=tis, or remove it",
        )
    elif floor is not None and cap is not None and floor >= cap:
        yield Problem(
            "loss_fn.truncated_importance_sampling_ratio_min",
            f"{floor:g} is not below loss_fn.truncated_importance_sampling_ratio={cap:g}",
            "lower it",
        )
    if data["grpo"]["skip_reference_policy_logprobs_calculation"] and loss["reference_policy_kl_penalty"]:
        yield Problem(
            "grpo.skip_reference_policy_logprobs_calculation",
            f"loss_fn.reference_policy_kl_penalty={loss['reference_policy_kl_penalty']:g} needs the reference",
            "set grpo.skip_reference_policy_logprobs_calculation=false, or the penalty to 0",
        )


def _alternatives(loss: dict[str, Any]) -> Iterator[Problem]:
    """What stands in place of the clipped ratio excludes one another, and the keys that it does not read."""
    if loss["use_cispo"]:
        for key, wanted in (
            ("disable_ppo_ratio", False),
            ("force_on_policy_ratio", False),
            ("sequence_level_importance_ratios", False),
            ("ratio_clip_c", None),
            ("token_level_loss", True),
        ):
            if loss[key] != wanted:
                now, right = (str(value).lower().replace("none", "null") for value in (loss[key], wanted))
                yield Problem(
                    f"loss_fn.{key}",
                    f"{now} does not go with loss_fn.use_cispo, which weighs each token with its clipped ratio",
                    f"set loss_fn.{key}={right}, or loss_fn.use_cispo=false",
                )
    elif loss["disable_ppo_ratio"] and loss["force_on_policy_ratio"]:
        yield Problem(
            "loss_fn.disable_ppo_ratio",
            "true, but loss_fn.force_on_policy_ratio takes the ratio as 1",
            "set one of them to false (their gradients are the same)",
        )
    elif loss["ratio_clip_c"] is not None and (loss["disable_ppo_ratio"] or loss["force_on_policy_ratio"]):
        off = "disable_ppo_ratio" if loss["disable_ppo_ratio"] else "force_on_policy_ratio"
        yield Problem(
            "loss_fn.ratio_clip_c",
            f"{loss['ratio_clip_c']:g} bounds a ratio, and with loss_fn.{off} there is none to bound",
            f"set loss_fn.ratio_clip_c=null, or loss_fn.{off}=false",
        )
    if loss["use_kl_in_reward"] and loss["use_on_policy_kl_approximation"]:
        yield Problem(
            "loss_fn.use_on_policy_kl_approximation",
            "weighs the KL of the loss, but loss_fn.use_kl_in_reward puts the KL into the advantages",
            "set one of them to false",
        )
    if loss["use_kl_in_reward"] and not loss["reference_policy_kl_penalty"]:
        yield Problem(
            "loss_fn.use_kl_in_reward",
            "true, but loss_fn.reference_policy_kl_penalty=0 takes nothing off",
            "set the penalty above 0, or loss_fn.use_kl_in_reward=false",
        )


def _batches(data: dict[str, Any]) -> Iterator[Problem]:
    """Rollouts of a step, against optimizer steps, micro-batches and ranks."""
    prompts, group = data["grpo"]["num_prompts_per_step"], data["grpo"]["num_generations_per_prompt"]
    rollouts, size = prompts * group, data["policy"]["train_global_batch_size"]
    key, made = "policy.train_global_batch_size", f"{rollouts} rollouts ({prompts} prompts x {group})"
    remove = "remove it (unset, it is all rollouts of a step)"
    if data["loss_fn"]["force_on_policy_ratio"] and rollouts != size:
        yield Problem(
            key,
            f"{size}, but a step makes {made}, and loss_fn.force_on_policy_ratio trains on all of them at once",
            f"{remove}, set it to {rollouts}, or set loss_fn.force_on_policy_ratio=false",
        )
    elif rollouts % size:
        yield Problem(key, f"{size} does not divide a step's {made}", f"set it to a divisor of {rollouts}, or {remove}")
    elif rollouts != size:
        yield from check_batch(data, "policy", "train", "rollouts")
    elif ranks := data_parallel_size(data):
        part = data["policy"]["train_micro_batch_size"] * ranks
        if rollouts % part:
            step = part // math.gcd(part, group)
            below, above = prompts // step * step, -(-prompts // step) * step
            yield Problem(
                "grpo.num_prompts_per_step",
                f"{made} do not divide into micro-batches of {part // ranks} on {ranks} data-parallel "
                f"{'ranks' if ranks > 1 else 'rank'} ({part} at a time)",
                f"set it to {f'{below} or ' if below else ''}{above}, or change policy.train_micro_batch_size",
            )


def _generation(data: dict[str, Any]) -> Iterator[Problem]:
    generation, longest = data["policy"]["generation"], data["policy"]["max_total_sequence_length"]
    at = "policy.generation"
    if generation["max_new_tokens"] > longest:
        yield Problem(
            f"{at}.max_new_tokens",
            f"{generation['max_new_tokens']} is more than policy.max_total_sequence_length={longest}",
            "lower it, or raise policy.max_total_sequence_length",
        )
    if generation["backend"] == "vllm" and generation["server"] is None:
        yield Problem(
            f"{at}.server",
            "vllm generates in a server, and none is named",
            f"name one of run.services or give an address; or set {at}.backend=megatron",
        )
    if generation["backend"] != "vllm" and generation["server"] is not None:
        yield Problem(
            f"{at}.server", f"is read only with {at}.backend=vllm", f"set {at}.backend=vllm, or {at}.server=null"
        )


def _services(data: dict[str, Any]) -> Iterator[Problem]:
    """Servers that are named must be among `run.services`.

    The trainer is given the config without `run`: there is nothing to compare then.
    """
    if "run" not in data:
        return
    services: dict[str, dict[str, Any]] = data["run"].get("services") or {}
    env = data["env"]
    for key, server in (
        ("policy.generation.server", data["policy"]["generation"]["server"]),
        ("env.nemo_gym.server", env["nemo_gym"]["server"]),
        ("env.judge.server", env["judge"]["server"]),
    ):
        if server is not None and "://" not in server and server not in services:
            known = f"run.services has {', '.join(services)}" if services else "run.services is empty"
            yield Problem(key, f"there is no service {server}", f"{known}; an address begins with http://")
