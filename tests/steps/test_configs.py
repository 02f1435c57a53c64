"""The shipped configs: valid before and after composition, and their arithmetic holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from nemotron_launch.catalog import load_steps
from nemotron_launch.config.checks import check, data_parallel_size, processes
from nemotron_launch.config.compose import compose
from nemotron_launch.resources import steps_dir

STEPS = steps_dir()
Standard = Callable[[Path], Draft202012Validator]
CONFIGS = sorted(STEPS.glob("**/config/*.yaml"))
TRAINING = [path for path in CONFIGS if path.relative_to(STEPS).parts[0] in ("sft", "rm", "rl")]
DPO, SFT = "rl/nemo_rl/dpo", "sft/megatron"
RLVR, RLHF = "rl/nemo_rl/rlvr", "rl/nemo_rl/rlhf"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RL_OUTPUT_DIR", "RL_POLICY_MODEL", "RL_SFT_CHECKPOINT", "RL_REWARD_MODEL"):
        monkeypatch.delenv(variable, raising=False)


def name(path: Path) -> str:
    return str(path.relative_to(STEPS))


def step_id(path: Path) -> str:
    return str(path.parent.parent.relative_to(STEPS))


def composed(step: str, config: str, *overrides: str) -> dict[str, Any]:
    folder = STEPS / step
    return compose(folder / f"config/{config}.yaml", overrides, schema=folder / "schema.json").data


def at(data: dict[str, Any], key: str) -> Any:
    for segment in key.split("."):
        data = data[segment]
    return data


def loop_of(data: dict[str, Any]) -> dict[str, Any]:
    """The section with the steps and the validations."""
    section: dict[str, Any] = data.get("dpo") or data.get("sft") or data.get("rm") or data["grpo"]
    return section


def test_each_step_ships_default_and_tiny() -> None:
    steps = load_steps(STEPS)
    assert all({"default", "tiny"} <= set(step.configs()) for step in steps)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_editor_finds_the_schema_and_nothing_to_complain_about(path: Path, standard: Standard) -> None:
    text = path.read_text()
    line = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert line, "the first line names the schema"
    schema = (path.parent / line.group(1)).resolve()
    assert schema == (path.parent.parent / "schema.json").resolve()
    standard(schema).validate(yaml.safe_load(text))


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_composes_to_what_its_schema_accepts(path: Path, standard: Standard) -> None:
    schema = path.parent.parent / "schema.json"
    standard(schema).validate(compose(path, schema=schema).data)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_has_no_problems(path: Path) -> None:
    assert check(step_id(path), compose(path, schema=path.parent.parent / "schema.json").data) == []


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_arithmetic_of_a_config_holds(path: Path) -> None:
    data = compose(path, schema=path.parent.parent / "schema.json").data
    ranks = data_parallel_size(data)
    assert ranks
    assert data["policy"]["train_global_batch_size"] % (data["policy"]["train_micro_batch_size"] * ranks) == 0
    if "grpo" in data:
        return
    loop = loop_of(data)
    assert loop["val_global_batch_size"] % (loop["val_micro_batch_size"] * ranks) == 0


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_every_checkpoint_has_the_metric_that_ranks_it(path: Path) -> None:
    data = compose(path, schema=path.parent.parent / "schema.json").data
    loop = loop_of(data)
    assert data["checkpointing"]["save_period"] % loop["val_period"] == 0
    assert loop["val_at_end"]  # the last step is saved whatever its number


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_everything_that_a_run_writes_is_below_rl_output_dir(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_OUTPUT_DIR", "/somewhere")
    data = compose(path, schema=path.parent.parent / "schema.json").data
    assert data["output_dir"].startswith("/somewhere/")
    if path not in TRAINING:
        return
    assert data["checkpointing"]["checkpoint_dir"] == f"{data['output_dir']}/checkpoints"
    assert data["logger"]["log_dir"] == f"{data['output_dir']}/logs"


@pytest.mark.parametrize("step", [DPO, SFT])
def test_configs_of_a_step_write_to_different_folders(step: str) -> None:
    assert composed(step, "default")["output_dir"] != composed(step, "tiny")["output_dir"]


@pytest.mark.parametrize("step", [DPO, SFT, RLVR, RLHF])
def test_environment_names_model_and_warm_start(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_POLICY_MODEL", "org/model")
    monkeypatch.setenv("RL_SFT_CHECKPOINT", "/warm/start")
    data = composed(step, "default")
    assert data["policy"]["model_name"] == data["policy"]["tokenizer"]["name"] == "org/model"
    assert data["checkpointing"]["pretrained_checkpoint"]["path"] == "/warm/start"


def test_default_dpo_has_the_shape_that_its_users_know() -> None:
    """500 steps of 32 pairs at lr 5e-7 and beta 0.05 on one node of 8 GPUs, as the public step's default."""
    data = composed(DPO, "default")
    expected = {
        "dpo.max_num_steps": 500,
        "dpo.val_period": 50,
        "dpo.reference_policy_kl_penalty": 0.05,
        "policy.train_global_batch_size": 32,
        "policy.max_total_sequence_length": 4096,
        "policy.megatron_cfg.optimizer.lr": 5e-7,
        "policy.megatron_cfg.scheduler.lr_warmup_iters": 50,
        "data.train.dataset_name": "HelpSteer3",
        "cluster.num_nodes": 1,
        "cluster.gpus_per_node": 8,
    }
    assert {key: at(data, key) for key in expected} == expected
    assert processes(data) == 8


def test_tiny_dpo_starts_from_what_tiny_sft_leaves() -> None:
    dpo, sft = composed(DPO, "tiny"), composed(SFT, "tiny")
    assert dpo["run"]["make_missing"]["checkpoint_megatron"] == {"step": SFT, "config": "tiny"}
    assert dpo["checkpointing"]["pretrained_checkpoint"]["path"] == sft["checkpointing"]["checkpoint_dir"]
    for key in ("architecture", "tokenizer", "precision"):
        assert dpo["policy"][key] == sft["policy"][key]


@pytest.mark.parametrize("step", [DPO, SFT])
def test_tiny_needs_no_gpu_and_no_network(step: str) -> None:
    data = composed(step, "tiny")
    assert data["policy"]["model_name"] is None
    assert data["policy"]["device"] == "cpu"
    assert processes(data) <= 2  # the machine that tiny is made for has two cores
    for section in ("train", "validation"):
        assert data["data"][section]["data_path"].startswith("step://")


@pytest.mark.parametrize("step", [DPO, SFT])
@pytest.mark.parametrize(
    "layout",
    [
        ["cluster.procs_per_node=2"],
        ["cluster.procs_per_node=2", "policy.megatron_cfg.tensor_model_parallel_size=2"],
        ["cluster.procs_per_node=2", "policy.megatron_cfg.pipeline_model_parallel_size=2"],
    ],
    ids=["data", "tensor", "pipeline"],
)
def test_tiny_runs_on_two_processes_in_any_layout(step: str, layout: list[str]) -> None:
    assert check(step, composed(step, "tiny", *layout)) == []
