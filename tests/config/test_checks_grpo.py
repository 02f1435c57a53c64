"""Cross-checks of configs with rollouts: each wrong one gives one problem, at the key to change, with what to do.

The right configs that are changed here are the shipped ones.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nemotron_launch.config.checks import check
from nemotron_launch.config.compose import compose
from nemotron_launch.resources import steps_dir


def shipped(step: str, config: str) -> dict[str, Any]:
    folder = steps_dir() / f"rl/nemo_rl/{step}"
    return compose(folder / f"config/{config}.yaml", schema=folder / "schema.json", env={}).data


RLVR, GYM, RLHF = shipped("rlvr", "default"), shipped("rlvr", "nemo_gym"), shipped("rlhf", "default")


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = copy.deepcopy(value)
    return data


LOSS = "loss_fn.truncated_importance_sampling"
GENERATION = "policy.generation"
SIZE = "policy.train_global_batch_size"
SERVICE: dict[str, Any] = {"command": ["vllm"], "port": 8001, "gpus": 0, "nodes": 0}

# key of the problem, words of its message, words of its hint, the config, what is changed in it
WRONG: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "one rollout": (
        "grpo.num_generations_per_prompt", "no others", "=8", RLVR,
        {"grpo.num_generations_per_prompt": 1, SIZE: 32},
    ),
    "two rollouts with a leave-one-out baseline": (
        "grpo.num_generations_per_prompt", "deviation is 0", "4 or more", RLVR,
        {"grpo.num_generations_per_prompt": 2, SIZE: 64},
    ),
    "dynamic sampling with a leave-one-out baseline": (
        "grpo.use_leave_one_out_baseline", "only right rollout", "=false", RLVR, {"grpo.use_dynamic_sampling": True},
    ),
    "a multiplier that nothing reads": (
        "grpo.batch_multiplier", "1.5 is read only", "use_dynamic_sampling=true", RLVR, {"grpo.batch_multiplier": 1.5},
    ),
    "a multiplier that cuts a prompt": (
        "grpo.batch_multiplier", "1.3 x grpo.num_prompts_per_step=32", "another", RLVR,
        {"grpo.use_dynamic_sampling": True, "grpo.use_leave_one_out_baseline": False, "grpo.batch_multiplier": 1.3},
    ),
    "advantage clips the wrong way round": (
        "grpo.advantage_clip_low", "60 is not below grpo.advantage_clip_high=50", "lower", RLVR,
        {"grpo.advantage_clip_low": 60},
    ),
    "a penalty for every length": (
        "grpo.reward_shaping.overlong_buffer_length", "4096 is not less than", "lower", RLVR,
        {"grpo.reward_shaping.enabled": True, "grpo.reward_shaping.overlong_buffer_length": 4096},
    ),
    "scaling from nothing": (
        "grpo.reward_scaling.source_min", "1 is not below", "range", RLVR,
        {"grpo.reward_scaling.enabled": True, "grpo.reward_scaling.source_min": 1},
    ),
    "sequence ratios in a token loss": (
        "loss_fn.token_level_loss", "GSPO", "=false", RLVR, {"loss_fn.sequence_level_importance_ratios": True},
    ),
    "a limit without its type": (f"{LOSS}_ratio", "5 is read only", "tis", RLVR, {f"{LOSS}_type": None}),
    "a limited correction that is off": (
        f"{LOSS}_type", "tis limits a correction that is off", "=true", RLVR,
        {"loss_fn.use_importance_sampling_correction": False},
    ),
    "a type without its limit": (f"{LOSS}_ratio", "tis needs a limit", "to 5", RLVR, {f"{LOSS}_ratio": None}),
    "icepop without a lower limit": (
        f"{LOSS}_ratio_min", "icepop needs a lower limit", "0.5", RLVR, {f"{LOSS}_type": "icepop"},
    ),
    "limits the wrong way round": (
        f"{LOSS}_ratio_min", "6 is not below", "lower", RLVR, {f"{LOSS}_type": "icepop", f"{LOSS}_ratio_min": 6},
    ),
    "a lower limit without a type": (
        f"{LOSS}_ratio_min", "0.5 is read only", "tis", RLVR,
        {f"{LOSS}_type": None, f"{LOSS}_ratio": None, f"{LOSS}_ratio_min": 0.5},
    ),
    "tokens left out of one weight for all": (
        f"{LOSS}_type", "one weight", "tis or icepop", RLVR,
        {
            f"{LOSS}_type": "seq-mask-tis", f"{LOSS}_ratio_min": 0.9,
            "loss_fn.sequence_level_importance_ratios": True, "loss_fn.token_level_loss": False,
        },
    ),
    "CISPO without a ratio": (
        "loss_fn.force_on_policy_ratio", "does not go with loss_fn.use_cispo", "=false", RLVR,
        {"loss_fn.use_cispo": True, "loss_fn.force_on_policy_ratio": True},
    ),
    "CISPO with a dual clip": (
        "loss_fn.ratio_clip_c", "3 does not go with", "=null", RLVR,
        {"loss_fn.use_cispo": True, "loss_fn.force_on_policy_ratio": False, "loss_fn.ratio_clip_c": 3},
    ),
    "CISPO by sequences": (
        "loss_fn.token_level_loss", "false does not go with", "=true", RLVR,
        {"loss_fn.use_cispo": True, "loss_fn.force_on_policy_ratio": False, "loss_fn.token_level_loss": False},
    ),
    "two ways to do without a ratio": (
        "loss_fn.disable_ppo_ratio", "takes the ratio as 1", "one of them", RLVR,
        {"loss_fn.disable_ppo_ratio": True, "loss_fn.force_on_policy_ratio": True},
    ),
    "a bound on no ratio": (
        "loss_fn.ratio_clip_c", "none to bound", "=null", RLVR,
        {"loss_fn.ratio_clip_c": 3, "loss_fn.force_on_policy_ratio": True},
    ),
    "a weight of a KL that is in the reward": (
        "loss_fn.use_on_policy_kl_approximation", "into the advantages", "one of them", RLHF,
        {"loss_fn.use_kl_in_reward": True, "loss_fn.use_on_policy_kl_approximation": True},
    ),
    "a KL of nothing in the reward": (
        "loss_fn.use_kl_in_reward", "takes nothing off", "above 0", RLHF,
        {
            "loss_fn.use_kl_in_reward": True, "loss_fn.use_on_policy_kl_approximation": False,
            "loss_fn.reference_policy_kl_penalty": 0,
        },
    ),
    "a KL penalty without the reference": (
        "grpo.skip_reference_policy_logprobs_calculation", "0.0001 needs the reference", "=false", RLHF,
        {"grpo.skip_reference_policy_logprobs_calculation": True},
    ),
    "12 x 8 rollouts against a batch of 32, on policy": (  # the public step's default
        SIZE, "32, but a step makes 96 rollouts (12 prompts x 8)", "set it to 96", RLVR,
        {"grpo.num_prompts_per_step": 12, SIZE: 32},
    ),
    "a batch that does not divide the rollouts": (
        SIZE, "40 does not divide a step's 256 rollouts", "divisor of 256", RLVR,
        {SIZE: 40, "loss_fn.force_on_policy_ratio": False},
    ),
    "a batch that does not divide over the ranks": (
        SIZE, "16 rollouts do not divide into micro-batches of 4 on 8", "to 32", RLVR,
        {SIZE: 16, "loss_fn.force_on_policy_ratio": False},
    ),
    "rollouts that do not divide over the ranks": (  # 4 x 8 ranks = 32 at a time; 8 rollouts a prompt: 4 prompts
        "grpo.num_prompts_per_step", "240 rollouts (30 prompts x 8) do not divide", "to 28 or 32", RLVR,
        {"grpo.num_prompts_per_step": 30, SIZE: 240},
    ),
    "processes that do not divide": (
        "policy.megatron_cfg.tensor_model_parallel_size", "tensor 3", "lower", RLVR,
        {"policy.megatron_cfg.tensor_model_parallel_size": 3, "policy.make_sequence_length_divisible_by": 3},
    ),
    "answers longer than the sequence": (
        f"{GENERATION}.max_new_tokens", "8192 is more than", "lower it", RLVR, {f"{GENERATION}.max_new_tokens": 8192},
    ),
    "a server that nothing asks": (
        f"{GENERATION}.server", "read only with", "null", RLVR, {f"{GENERATION}.server": "http://here:8000/v1"},
    ),
    "vllm without a server": (
        f"{GENERATION}.server", "none is named", "megatron", RLVR, {f"{GENERATION}.backend": "vllm"},
    ),
    "no training data": (
        "data.train.data_path", "no data", "file", RLVR, {"data.train": {"dataset_name": "ResponseDataset"}},
    ),
    "one validation size only": (
        "grpo.max_val_samples", "null, while the other of the two is 256", "both", RLVR, {"grpo.max_val_samples": None},
    ),
    "the training file as validation": (
        "data.validation.data_path", "rows.jsonl is the training data too", "allow_train_as_validation", RLVR,
        {"data.train.data_path": "rows.jsonl", "data.validation.data_path": ["other.jsonl", "rows.jsonl"]},
    ),
    "the training split as validation": (
        "data.validation.data_path", "gsm8k is the training data too", "held-out", RLVR,
        {"data.validation.split": "train"},
    ),
    "nothing that scores": ("data.default.env_name", "nothing scores", "math", RLVR, {"data.default.env_name": None}),
    "an environment that does not exist": (
        "data.default.env_name", "no environment maths", "did you mean math?", RLVR, {"data.default.env_name": "maths"},
    ),
    "a function without its module": (
        "data.train.env_name", "no environment python:score", "python:module.function", RLVR,
        {"data.train.env_name": "python:score", "data.validation.env_name": "exact"},
    ),
    "rows for NeMo Gym while it is off": (
        "env.should_use_nemo_gym", "false, but data.train is scored by NeMo Gym", "=true", GYM,
        {"env.should_use_nemo_gym": False},
    ),
    "NeMo Gym beside another environment": (
        "env.should_use_nemo_gym", "true, but the rollouts are scored by math", "nemo_gym", RLVR,
        {"env.should_use_nemo_gym": True},
    ),
    "NeMo Gym with a dataset that is not its own": (
        "data.train.dataset_name", "gsm8k has no rows for NeMo Gym", "NemoGymDataset", GYM,
        {"data.train": {"dataset_name": "gsm8k"}},
    ),
    "NeMo Gym without servers": (
        "env.nemo_gym.server", "no servers", "run.services", GYM, {"env.nemo_gym.server": None},
    ),
    "a server that waits for more rollouts than there are": (
        "env.nemo_gym.genrm_compare_resources_server.resources_servers.genrm_compare.num_rollouts_per_prompt",
        "16, but grpo.num_generations_per_prompt=8", "${grpo.num_generations_per_prompt}", GYM,
        {
            "env.nemo_gym.genrm_compare_resources_server": {
                "resources_servers": {"genrm_compare": {"num_rollouts_per_prompt": 16}}
            }
        },
    ),
    "no judge": ("env.judge.model", "no judge", "RL_REWARD_MODEL", RLHF, {"env.judge.model": None}),
    "a judge without a server": ("env.judge.server", "none is named", "run.services", RLHF, {"env.judge.server": None}),
    "a pairwise judge of single answers": (
        "grpo.val_num_generations_per_prompt", "compare it with", "2 or more", RLHF,
        {"grpo.val_num_generations_per_prompt": 1},
    ),
    "the policy as its own judge": (
        "env.judge.model", "policy.model_name too", "allow_policy_as_judge", RLHF,
        {"env.judge.model": "meta-llama/Llama-3.2-1B-Instruct"},
    ),
    "the warm start as reward model": (
        "env.reward_model.model_name", "/warm is checkpointing.pretrained_checkpoint.path too", "own checkpoint", RLHF,
        {
            "data.default.env_name": "reward_model",
            "env.reward_model.model_name": "/warm",
            "checkpointing.pretrained_checkpoint.path": "/warm",
        },
    ),
    "starting from one's own checkpoints": (
        "checkpointing.pretrained_checkpoint.path", "own", "another output_dir", RLVR,
        {"checkpointing.pretrained_checkpoint.path": "./output/rl/rlvr-default/checkpoints"},
    ),
    "a validation metric without held-out prompts": (
        "checkpointing.metric_name", "needs validation data", "null", RLVR, {"data.validation": None},
    ),
    "a metric without its source": (
        "checkpointing.metric_name", "'accuracy' does not say", "val:accuracy", RLVR,
        {"checkpointing.metric_name": "accuracy"},
    ),
    "a service that does not exist": (
        "env.judge.server", "no service genrm", "run.services has judge", RLHF, {"env.judge.server": "genrm"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("key", "message", "hint", "base", "changes"), WRONG.values(), ids=WRONG.keys())
def test_problem_is_named_once_with_its_remedy(
    key: str, message: str, hint: str, base: dict[str, Any], changes: dict[str, Any]
) -> None:
    (problem,) = check("rl/nemo_rl/rlvr", changed(base, changes))
    assert problem.key == key
    assert message in problem.message
    assert hint in problem.hint


RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two rollouts against the group's mean": (
        RLVR, {"grpo.num_generations_per_prompt": 2, "grpo.use_leave_one_out_baseline": False, SIZE: 64},
    ),
    "plain policy gradient": (RLVR, {"loss_fn.disable_ppo_ratio": True, "loss_fn.force_on_policy_ratio": False}),
    "CISPO": (RLVR, {"loss_fn.use_cispo": True, "loss_fn.force_on_policy_ratio": False}),
    "the KL in the reward": (
        RLHF, {"loss_fn.use_kl_in_reward": True, "loss_fn.use_on_policy_kl_approximation": False},
    ),
    "several optimizer steps for a step's rollouts": (RLVR, {SIZE: 64, "loss_fn.force_on_policy_ratio": False}),
    "dynamic sampling against the group's mean": (
        RLVR,
        {"grpo.use_dynamic_sampling": True, "grpo.use_leave_one_out_baseline": False, "grpo.batch_multiplier": 1.5},
    ),
    "all held-out prompts at once": (RLVR, {"grpo.max_val_samples": None, "grpo.val_batch_size": None}),
    "held out from the training data": (RLVR, {"data.validation": None, "data.train.split_validation_size": 0.05}),
    "the training data as validation, on purpose": (
        RLVR, {"data.validation.split": "train", "data.allow_train_as_validation": True},
    ),
    "no validation, no metric": (RLVR, {"data.validation": None, "checkpointing.metric_name": None}),
    "a function of one's own": (RLVR, {"data.default.env_name": "python:mine.scores.length"}),
    "rollouts from a server": (
        RLVR,
        {f"{GENERATION}.backend": "vllm", f"{GENERATION}.server": "policy", "run.services": {"policy": SERVICE}},
    ),
    "a judge that runs already": (
        RLHF, {"env.judge.server": "https://judge:8000/v1", "run.services": {}},
    ),
    "a reward model needs no server": (
        RLHF, {"data.default.env_name": "reward_model", "run.services": {}, "env.judge.server": None},
    ),
    "the policy as its own judge, on purpose": (
        RLHF, {"env.judge.model": "meta-llama/Llama-3.2-1B-Instruct", "env.allow_policy_as_judge": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("base", "changes"), RIGHT.values(), ids=RIGHT.keys())
def test_right_config_is_not_refused(base: dict[str, Any], changes: dict[str, Any]) -> None:
    assert check("rl/nemo_rl/rlhf", changed(base, changes)) == []


def test_trainer_is_given_no_services_and_misses_none() -> None:
    data = copy.deepcopy(RLHF)
    del data["run"]
    assert check("rl/nemo_rl/rlhf", data) == []
