"""The shipped configs of rlvr and rlhf: their shape, their arithmetic, and the overrides that people type."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nemotron_launch.config.checks import check, processes
from nemotron_launch.config.compose import compose
from nemotron_launch.resources import steps_dir

CONFIGS = [("rlvr", "default"), ("rlvr", "nemo_gym"), ("rlhf", "default")]
EACH = pytest.mark.parametrize(("step", "config"), CONFIGS, ids=["-".join(pair) for pair in CONFIGS])


def composed(step: str, config: str, *overrides: str) -> dict[str, Any]:
    folder = steps_dir() / "rl/nemo_rl" / step
    return compose(folder / f"config/{config}.yaml", overrides, schema=folder / "schema.json", env={}).data


@EACH
def test_all_rollouts_of_a_step_are_one_batch_of_whole_groups(step: str, config: str) -> None:
    data = composed(step, config)
    prompts, group = data["grpo"]["num_prompts_per_step"], data["grpo"]["num_generations_per_prompt"]
    assert data["loss_fn"]["force_on_policy_ratio"] is True
    assert data["policy"]["train_global_batch_size"] == prompts * group
    # A leave-one-out deviation over two others or fewer says nothing.
    assert group >= 4 or not data["grpo"]["use_leave_one_out_baseline"]


@EACH
def test_validation_sizes_are_numbers(step: str, config: str) -> None:
    grpo = composed(step, config)["grpo"]
    assert isinstance(grpo["max_val_samples"], int) and isinstance(grpo["val_batch_size"], int)


@EACH
def test_prompt_and_answer_fill_the_sequence_exactly(step: str, config: str) -> None:
    data = composed(step, config)
    longest = data["data"]["max_input_seq_length"] + data["policy"]["generation"]["max_new_tokens"]
    assert longest == data["policy"]["max_total_sequence_length"]


@EACH
def test_policy_starts_from_a_checkpoint_and_whatever_scores_is_another_model(step: str, config: str) -> None:
    data = composed(step, config)
    assert data["policy"]["megatron_cfg"]["enabled"] is True
    assert "path" in data["checkpointing"]["pretrained_checkpoint"]
    assert data["policy"]["model_name"] not in (
        data["env"]["judge"]["model"],
        data["env"]["reward_model"]["model_name"],
    )


def test_configs_write_to_different_folders() -> None:
    assert len({composed(step, config)["output_dir"] for step, config in CONFIGS}) == len(CONFIGS)


def test_judge_has_nodes_of_its_own_as_large_as_those_that_train() -> None:
    data = composed("rlhf", "default")
    judge = data["run"]["services"]["judge"]
    assert processes(data) == data["cluster"]["num_nodes"] * data["cluster"]["gpus_per_node"]
    assert (judge["nodes"], judge["gpus"]) == (1, data["cluster"]["gpus_per_node"])
    sizes = [int(word.partition("=")[2]) for word in judge["command"] if "-parallel-size=" in word]
    assert math.prod(sizes) == judge["nodes"] * judge["gpus"]
    assert f"--port={judge['port']}" in judge["command"]
    assert data["env"]["judge"]["server"] == "judge"


def test_judge_that_is_served_is_the_judge_that_is_asked() -> None:
    data = composed("rlhf", "default", "env.judge.model=org/other")
    assert data["run"]["services"]["judge"]["command"][:3] == ["vllm", "serve", "org/other"]


def test_judge_compares_the_whole_group_and_waits_for_no_more() -> None:
    assert (
        composed("rlhf", "default", "grpo.num_generations_per_prompt=16")["env"]["judge"]["num_rollouts_per_prompt"]
        == 16
    )


def test_gym_servers_run_on_the_cpus_and_are_started_from_the_configs_that_are_named() -> None:
    data = composed("rlvr", "nemo_gym", "env.nemo_gym.config_paths=[a.yaml,b.yaml]")
    gym = data["run"]["services"][data["env"]["nemo_gym"]["server"]]
    assert gym["gpus"] == 0
    assert "+config_paths=['a.yaml', 'b.yaml']" in gym["command"]  # a list in Hydra's grammar, which ng_run reads
    assert f"+head_server.port={gym['port']}" in gym["command"]


# As people type them for the public tool, profile apart.
DOCUMENTED = [
    ("rlvr", "default", ["grpo.num_generations_per_prompt=16", "grpo.max_num_steps=1000"]),
    ("rlvr", "default", ["grpo.num_prompts_per_step=24"]),
    ("rlvr", "default", ["grpo.use_leave_one_out_baseline=false", "grpo.normalize_rewards=false"]),
    ("rlvr", "default", ["policy.model_name=meta-llama/Llama-3.2-3B-Instruct", "policy.optimizer.lr=5.0e-7"]),
    (
        "rlvr",
        "default",
        ["data.train.data_path=/lustre/rlvr/train.jsonl", "data.validation.data_path=/lustre/val.jsonl"],
    ),
    (
        "rlvr",
        "nemo_gym",
        [
            "env.should_use_nemo_gym=true",
            "data.train.data_path=/lustre/rlvr/train.jsonl",
            "data.validation.data_path=/lustre/rlvr/val.jsonl",
        ],
    ),
    (
        "rlhf",
        "default",
        [
            "env.nemo_gym.genrm_model.responses_api_models.vllm_model.model=nvidia/Nemotron-Reward-Model",
            "grpo.num_generations_per_prompt=16",
        ],
    ),
    (
        "rlhf",
        "default",
        [
            "grpo.max_num_steps=1000",
            "data.train.data_path=/lustre/rlhf/train.jsonl",
            "data.validation.data_path=/lustre/rlhf/val.jsonl",
        ],
    ),
    ("rlhf", "default", ["grpo.num_prompts_per_step=32"]),
]


@pytest.mark.parametrize(("step", "config", "overrides"), DOCUMENTED, ids=[" ".join(o)[:60] for _, _, o in DOCUMENTED])
def test_documented_overrides_compose_and_pass_the_checks(step: str, config: str, overrides: list[str]) -> None:
    assert check(f"rl/nemo_rl/{step}", composed(step, config, *overrides)) == []
