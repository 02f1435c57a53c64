"""The schema parts: valid, complete against NeMo-RL's keys, honest about what is not implemented."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from nemotron_launch.config.compose import compose
from nemotron_launch.config.schema import known_paths, load_schema
from nemotron_launch.errors import UserError
from nemotron_launch.resources import steps_dir

STEPS = steps_dir()
FILES = sorted([*STEPS.glob("schemas/*.json"), *STEPS.glob("**/schema.json")])
Standard = Callable[[Path], Draft202012Validator]
STEP_SCHEMAS = sorted(STEPS.glob("**/schema.json"))
DPO = STEPS / "rl/nemo_rl/dpo"
SFT = STEPS / "sft/megatron"


def name(path: Path) -> str:
    return str(path.relative_to(STEPS))


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every subschema of a file."""
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword in ("properties", "$defs"):
        for part in schema.get(keyword, {}).values():
            yield from parts(part)
    for keyword in ("items", "additionalProperties", "propertyNames"):
        yield from parts(schema.get(keyword))


def keys(path: Path) -> dict[str, dict[str, Any]]:
    """Dotted key: its part, of a step's whole config."""
    return {".".join(key): part for key, part in known_paths(load_schema(path))}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_is_json_schema(path: Path) -> None:
    Draft202012Validator.check_schema(json.loads(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_reason_stands_only_beside_the_value_that_it_holds(path: Path) -> None:
    reasons = [part for part in parts(json.loads(path.read_text())) if "x-unsupported" in part]
    assert all("const" in part and part["x-unsupported"] for part in reasons)


@pytest.mark.parametrize("path", STEP_SCHEMAS, ids=name)
def test_every_key_is_described(path: Path) -> None:
    silent = [key for key, part in keys(path).items() if not (part.keys() & {"description", "x-inert", "properties"})]
    assert silent == []


@pytest.mark.parametrize("path", STEP_SCHEMAS, ids=name)
def test_alias_names_a_key_that_has_a_default(path: Path) -> None:
    known = keys(path)
    targets = {part["x-alias-of"] for part in known.values() if "x-alias-of" in part}
    assert "policy.megatron_cfg.optimizer.lr" in targets or "policy" not in known
    assert all("default" in known[target] for target in targets)


@pytest.mark.parametrize("path", STEP_SCHEMAS, ids=name)
def test_defaults_alone_are_valid(path: Path, tmp_path: Path, standard: Standard) -> None:
    (tmp_path / "empty.yaml").write_text("{}\n")
    composed = compose(tmp_path / "empty.yaml", schema=path)
    standard(path).validate(composed.data)


# What NeMo-RL's DPO configs for Megatron carry, with the switches of its other backend off.
NEMO_RL_DPO = """
dpo:
  max_num_epochs: 1
  max_num_steps: 150
  val_period: 25
  val_batches: 8
  val_global_batch_size: 8
  val_micro_batch_size: 1
  val_at_start: true
  val_at_end: false
  seed: 42
  reference_policy_kl_penalty: 0.05
  preference_average_log_probs: false
  sft_average_log_probs: ${.preference_average_log_probs}
  preference_loss_weight: 1
  sft_loss_weight: 0
checkpointing:
  enabled: true
  checkpoint_dir: results/dpo
  metric_name: "val:validation-default_loss"
  higher_is_better: false
  keep_top_k: 3
  save_period: 50
  checkpoint_must_save_by: null
  save_optimizer: true
  pretrained_checkpoint: {path: warm, format: megatron_bridge}
  ft_save_period: 10
  ft_keep_latest_k: 1
  model_save_format: null
  save_consolidated: false
  model_cache_dir: null
  model_repo_id: null
  is_peft: false
  peft_config: null
  is_async: false
policy:
  model_name: meta-llama/Llama-3.2-1B-Instruct
  tokenizer: {name: "${policy.model_name}", chat_template: null, chat_template_kwargs: null, use_fastokens: false}
  train_global_batch_size: 128
  train_micro_batch_size: 2
  max_total_sequence_length: 1024
  precision: bfloat16
  offload_optimizer_for_logprob: false
  make_sequence_length_divisible_by: ${policy.megatron_cfg.tensor_model_parallel_size}
  max_grad_norm: 1.0
  dtensor_cfg:
    enabled: false
    _v2: true
    env_vars: {PYTORCH_CUDA_ALLOC_CONF: ""}
    cpu_offload: false
    sequence_parallel: false
    activation_checkpointing: false
    tensor_parallel_size: 1
    context_parallel_size: 1
    custom_parallel_plan: null
    clear_cache_every_n_steps: null
    automodel_kwargs: {}
    lora_cfg: {enabled: false, dim: 8, alpha: 32, dropout: 0.0, dropout_position: post, lora_A_init: xavier,
               match_all_linear: true, target_modules: [], exclude_modules: [], use_triton: true}
  dynamic_batching: {enabled: false}
  sequence_packing: {enabled: false}
  optimizer: null
  scheduler: null
  megatron_cfg:
    enabled: true
    env_vars: {}
    checkpoint: {async_save: false, ckpt_assume_constant_structure: false}
    use_fused_linear_logprobs: false
    fused_linear_logprobs_chunk_size: 256
    force_reconvert_from_hf: false
    empty_unused_memory_level: 1
    activation_checkpointing: false
    recompute_granularity: full
    recompute_modules: null
    cuda_graph_impl: none
    tensor_model_parallel_size: 2
    expert_tensor_parallel_size: 1
    expert_model_parallel_size: 1
    pipeline_model_parallel_size: 1
    context_parallel_size: 1
    pipeline_dtype: ${policy.precision}
    num_layers_in_first_pipeline_stage: null
    num_layers_in_last_pipeline_stage: null
    sequence_parallel: true
    freeze_moe_router: false
    moe_router_dtype: fp64
    moe_router_load_balancing_type: aux_loss
    moe_router_bias_update_rate: 1e-3
    moe_permute_fusion: true
    moe_per_layer_logging: false
    moe_token_dispatcher_type: alltoall
    moe_enable_deepep: false
    moe_shared_expert_overlap: false
    apply_rope_fusion: true
    bias_activation_fusion: true
    defer_fp32_logits: false
    use_gloo_process_groups: false
    gradient_accumulation_fusion: false
    fine_grained_activation_offloading: false
    peft: {enabled: false, dim: 8, alpha: 32, dropout: 0.0, lora_A_init_method: xavier, lora_B_init_method: zero,
           a2a_experimental: false}
    optimizer:
      optimizer: adam
      lr: 5.0e-6
      min_lr: 5.0e-6
      weight_decay: 0.1
      bf16: true
      fp16: false
      params_dtype: float32
      adam_beta1: 0.9
      adam_beta2: 0.98
      adam_eps: 1e-8
      sgd_momentum: 0.9
      use_distributed_optimizer: true
      use_precision_aware_optimizer: true
      clip_grad: ${policy.max_grad_norm}
      optimizer_cpu_offload: false
      optimizer_offload_fraction: 0.0
    scheduler:
      start_weight_decay: ${policy.megatron_cfg.optimizer.weight_decay}
      end_weight_decay: ${policy.megatron_cfg.optimizer.weight_decay}
      weight_decay_incr_style: constant
      lr_decay_style: constant
      lr_decay_iters: null
      lr_warmup_iters: 1
      lr_warmup_init: 1e-8
    distributed_data_parallel_config:
      grad_reduce_in_fp32: false
      overlap_grad_reduce: true
      overlap_param_gather: true
      data_parallel_sharding_strategy: optim_grads_params
      use_custom_fsdp: false
    fp8_cfg: {enabled: false, fp8: e4m3, fp8_recipe: blockwise, fp8_param: false}
data:
  max_input_seq_length: ${policy.max_total_sequence_length}
  shuffle: true
  num_workers: 1
  train: {dataset_name: BinaryPreferenceDataset, data_path: pairs.jsonl, prompt_key: context, subset: null, split: a}
  validation: {dataset_name: HelpSteer3, split: validation}
  default: {chosen_key: chosen, rejected_key: rejected, prompt_file: null, system_prompt_file: null}
  val_data_paths: {other: other.jsonl}
logger:
  log_dir: logs
  wandb_enabled: false
  tensorboard_enabled: false
  mlflow_enabled: false
  swanlab_enabled: false
  monitor_gpus: false
  num_val_samples_to_print: 0
  wandb: {project: dpo-dev, name: dpo, tags: [a]}
  swanlab: {project: dpo-dev, name: dpo}
  tensorboard: {log_dir: tb_logs-dpo-dev}
  mlflow: {experiment_name: dpo-dev, run_name: dpo, tracking_uri: null}
  gpu_monitoring: {collection_interval: 10, flush_interval: 10}
cluster: {gpus_per_node: 8, num_nodes: 1, segment_size: null}
"""


def test_nemo_rl_config_for_megatron_is_valid_as_it_stands(tmp_path: Path, standard: Standard) -> None:
    (tmp_path / "theirs.yaml").write_text(NEMO_RL_DPO)
    composed = compose(tmp_path / "theirs.yaml", schema=DPO / "schema.json")
    assert composed.data["policy"]["megatron_cfg"]["optimizer"]["clip_grad"] == 1.0
    standard(DPO / "schema.json").validate(composed.data)


def test_nemo_rl_dpo_config_says_what_a_default_of_ours_says() -> None:
    """The defaults of the dpo section are NeMo-RL's."""
    theirs = yaml.safe_load(NEMO_RL_DPO)["dpo"]
    ours = {key.removeprefix("dpo."): part for key, part in keys(DPO / "schema.json").items() if key.count(".") == 1}
    assert {key: ours[key]["default"] for key in theirs} == theirs


# Switched on, what is not implemented: the key, the value that turns it on, a word of the reason.
ON = [
    ("policy.dtensor_cfg.enabled", "true", "Megatron"),
    ("policy.dtensor_cfg.lora_cfg.enabled", "true", "LoRA"),
    ("policy.megatron_cfg.enabled", "false", "only backend"),
    ("policy.megatron_cfg.peft.enabled", "true", "LoRA"),
    ("policy.megatron_cfg.fp8_cfg.enabled", "true", "fp8"),
    ("policy.megatron_cfg.distributed_data_parallel_config.use_custom_fsdp", "true", "FSDP"),
    ("policy.megatron_cfg.context_parallel_size", "2", "packing"),
    ("policy.megatron_cfg.expert_model_parallel_size", "2", "dense"),
    ("policy.megatron_cfg.optimizer.optimizer", "sgd", "AdamW"),
    ("policy.megatron_cfg.optimizer.optimizer_cpu_offload", "true", "device"),
    ("policy.megatron_cfg.optimizer.fp16", "true", "bfloat16"),
    ("policy.megatron_cfg.use_fused_linear_logprobs", "true", "kernel"),
    ("policy.megatron_cfg.checkpoint.async_save", "true", "before the next step"),
    ("policy.sequence_packing.enabled", "true", "padded"),
    ("policy.offload_optimizer_for_logprob", "true", "device"),
    ("policy.tokenizer.use_fastokens", "true", "fastokens"),
    ("policy.optimizer.kwargs.betas", "[0.9,0.98]", "adam_beta1"),
    ("policy.scheduler", "[]", "megatron_cfg.scheduler"),
    ("checkpointing.is_async", "true", "before the next step"),
    ("checkpointing.is_peft", "true", "LoRA"),
    ("logger.swanlab_enabled", "true", "SwanLab"),
    ("logger.monitor_gpus", "true", "GPU utilisation"),
    ("cluster.segment_size", "4", "NVLink"),
    ("data.train.prompt_file", "pairs.jsonl", "not data"),
]


@pytest.mark.parametrize(("key", "value", "reason"), ON, ids=[key for key, _, _ in ON])
def test_what_is_not_implemented_is_refused_with_its_reason(key: str, value: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(DPO / "config/tiny.yaml", [f"++{key}={value}"], schema=DPO / "schema.json")
    assert f"{key}=" in caught.value.message
    assert "is not implemented: " in caught.value.message
    assert reason in caught.value.message
    assert caught.value.exit_code == 2


def test_what_is_not_implemented_may_be_named_when_off() -> None:
    off = ["policy.dtensor_cfg.enabled=false", "policy.sequence_packing.enabled=false", "policy.scheduler=null"]
    compose(DPO / "config/tiny.yaml", off, schema=DPO / "schema.json")


# One wrong value for each kind of rule, and a word of what the message says.
WRONG = [
    ("dpo.reference_policy_kl_penalty=0", "greater than 0"),
    ("dpo.reference=kept", "stored, resident, offloaded"),
    ("dpo.max_num_steps=ten", "whole number"),
    ("policy.precision=fp16", "float32, bfloat16"),
    ("policy.train_global_batch_size=0", "at least 1"),
    ("policy.megatron_cfg.optimizer.adam_beta2=1", "less than 1"),
    ("policy.megatron_cfg.scheduler.lr_decay_style=polynomial", "cosine"),
    ("data.max_bad_rows=1.5", "at most 1"),
    ("data.train.dataset_name=squad", "HelpSteer3"),
    ("checkpointing.keep_top_k=0", "at least 1"),
    ("cluster.num_nodes=0", "at least 1"),
]


@pytest.mark.parametrize(("override", "words"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_value_is_refused_with_what_is_allowed(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(DPO / "config/tiny.yaml", [f"++{override}"], schema=DPO / "schema.json")
    assert override.partition("=")[0] in caught.value.message
    assert words in caught.value.message


def test_misspelt_key_is_refused_with_the_key_that_was_meant() -> None:
    with pytest.raises(UserError) as caught:
        compose(DPO / "config/tiny.yaml", ["dpo.reference_policy_kl_penaltyy=1"], schema=DPO / "schema.json")
    assert "dpo.reference_policy_kl_penalty" in (caught.value.hint or "")


@pytest.mark.parametrize("alias", ["policy.optimizer.lr", "policy.optimizer.kwargs.lr"])
def test_learning_rate_may_be_set_by_its_other_names(alias: str) -> None:
    composed = compose(DPO / "config/tiny.yaml", [f"{alias}=1e-4"], schema=DPO / "schema.json")
    assert composed.data["policy"]["megatron_cfg"]["optimizer"]["lr"] == 1e-4


def test_sft_loss_average_follows_the_preference_loss() -> None:
    composed = compose(DPO / "config/tiny.yaml", ["dpo.preference_average_log_probs=true"], schema=DPO / "schema.json")
    assert composed.data["dpo"]["sft_average_log_probs"] is True


def test_weight_decay_of_the_schedule_follows_the_optimizer() -> None:
    override = "policy.optimizer.weight_decay=0.3"
    schedule = compose(SFT / "config/tiny.yaml", [override], schema=SFT / "schema.json").data["policy"]["megatron_cfg"]
    assert schedule["scheduler"]["start_weight_decay"] == schedule["scheduler"]["end_weight_decay"] == 0.3
