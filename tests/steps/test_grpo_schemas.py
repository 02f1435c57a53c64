"""The schemas of rlvr and rlhf: complete against NeMo-RL's GRPO keys, honest about what is not implemented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from nemotron_launch.config.compose import compose
from nemotron_launch.config.schema import known_paths, load_schema
from nemotron_launch.errors import UserError
from nemotron_launch.resources import steps_dir

RLVR, RLHF = (steps_dir() / f"rl/nemo_rl/{name}" for name in ("rlvr", "rlhf"))
BOTH = pytest.mark.parametrize("folder", [RLVR, RLHF], ids=["rlvr", "rlhf"])
Standard = Callable[[Path], Draft202012Validator]

# What NeMo-RL's GRPO configs for Megatron carry (grpo_math_1B_megatron and what its schema adds), with the switches of
# what is not implemented off: sequence packing, GPU monitoring, async_save, safetensors.
NEMO_RL_GRPO = """
grpo:
  num_prompts_per_step: 32
  num_generations_per_prompt: 16
  max_rollout_turns: 1
  max_num_epochs: 1
  max_num_steps: 1000000
  normalize_rewards: true
  use_leave_one_out_baseline: true
  val_period: 10
  val_start_at: -1
  val_at_start: false
  val_at_end: false
  overlong_filtering: false
  advantage_clip_low: null
  advantage_clip_high: null
  max_val_samples: 256
  val_num_generations_per_prompt: 1
  stop_at_validation_metric: null
  stop_at_validation_threshold: null
  val_batch_size: 256
  seed: 42
  use_dynamic_sampling: false
  dynamic_sampling_max_gen_batches: 10
  batch_multiplier: 1
  skip_reference_policy_logprobs_calculation: false
  calculate_advantages_on_gpu: false
  seq_logprob_error_threshold: null
  invalid_tool_call_advantage: null
  malformed_thinking_advantage: null
  reward_shaping:
    enabled: false
    overlong_buffer_length: 128
    overlong_buffer_penalty: 1
    max_response_length: ${policy.max_total_sequence_length}
    stop_properly_penalty_coef: null
  reward_scaling: {enabled: false, source_min: 0.0, source_max: 1.0, target_min: 0.0, target_max: 1.0}
  adv_estimator:
    name: grpo
    normalize_rewards: ${grpo.normalize_rewards}
    use_leave_one_out_baseline: ${grpo.use_leave_one_out_baseline}
    minus_baseline: true
    reward_weights: null
  async_grpo: {enabled: false, max_trajectory_age_steps: 1, max_generation_failures: 0,
               in_flight_weight_updates: false, recompute_kv_cache_after_weight_updates: false}
  reward_penalties: {penalize_duplicated_reasoning: false, penalize_empty_final_answer: false,
                     penalize_unwanted_tokens: false, penalize_malformed_think_tag: false, token_ids: null}
loss_fn:
  reference_policy_kl_penalty: 0.01
  reference_policy_kl_type: k3
  kl_input_clamp_value: 20.0
  kl_output_clamp_value: 10.0
  ratio_clip_min: 0.2
  ratio_clip_max: 0.2
  ratio_clip_c: null
  use_on_policy_kl_approximation: false
  use_importance_sampling_correction: false
  truncated_importance_sampling_type: null
  truncated_importance_sampling_ratio: null
  truncated_importance_sampling_ratio_min: null
  sequence_level_importance_ratios: false
  token_level_loss: true
  force_on_policy_ratio: false
  use_kl_in_reward: false
  use_cispo: false
  disable_ppo_ratio: false
  positive_example_nll_weight: 0
checkpointing: {enabled: true, checkpoint_dir: results/grpo, metric_name: "val:accuracy", higher_is_better: true,
                keep_top_k: 3, save_period: 10, checkpoint_must_save_by: null, model_save_format: null}
policy:
  model_name: Qwen/Qwen2.5-1.5B
  tokenizer: {name: "${policy.model_name}", chat_template_kwargs: null}
  train_global_batch_size: 512
  train_micro_batch_size: 4
  generation_batch_size: 32
  logprob_batch_size: ${policy.train_micro_batch_size}
  max_total_sequence_length: 512
  precision: bfloat16
  logprob_chunk_size: null
  dtensor_cfg: {enabled: false}
  dynamic_batching:
    enabled: false
    train_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}
    logprob_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.logprob_batch_size}}
    sequence_length_round: 64
  sequence_packing:
    enabled: false
    train_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.train_micro_batch_size}}
    logprob_mb_tokens: ${mul:${policy.max_total_sequence_length}, ${policy.logprob_batch_size}}
    algorithm: modified_first_fit_decreasing
    sequence_length_round: 64
    microbatch_order: packer
  make_sequence_length_divisible_by: ${policy.megatron_cfg.tensor_model_parallel_size}
  max_grad_norm: 1.0
  optimizer: null
  scheduler: null
  megatron_cfg:
    enabled: true
    mtp_num_layers: 0
    freeze_moe_router: true
    moe_router_load_balancing_type: none
    moe_router_bias_update_rate: 0.0
    checkpoint: {async_save: false, ckpt_assume_constant_structure: false}
    optimizer: {optimizer: adam, lr: 5.0e-6, min_lr: 5.0e-7, weight_decay: 0.01, adam_beta1: 0.9, adam_beta2: 0.999,
                adam_eps: 1e-8, clip_grad: "${policy.max_grad_norm}"}
    scheduler: {lr_decay_style: constant, lr_decay_iters: 1000, lr_warmup_iters: 13, lr_warmup_init: 5.0e-7}
  generation:
    port_range_low: 3000
    port_range_high: 4999
    backend: vllm
    max_new_tokens: ${policy.max_total_sequence_length}
    temperature: 1.0
    top_p: 1.0
    top_k: null
    val_temperature: ${.temperature}
    val_top_p: ${.top_p}
    val_top_k: ${.top_k}
    stop_token_ids: null
    stop_strings: null
    refit_transport: null
    mcore_generation_config: {buffer_size_gb: 10, block_size_tokens: 256, max_tokens: 16384, num_cuda_graphs: 4,
                              enable_chunked_prefill: true, enable_prefix_caching: false,
                              kv_cache_management_mode: persist, refit_backend: nccl, expose_http_server: false}
    vllm_cfg: {async_engine: false, precision: "${policy.precision}", kv_cache_dtype: auto, tensor_parallel_size: 1,
               pipeline_parallel_size: 1, expert_parallel_size: 1, gpu_memory_utilization: 0.6,
               max_model_len: "${policy.max_total_sequence_length}", enforce_eager: false, use_deep_gemm: false,
               logprobs_mode: processed_logprobs, enable_vllm_metrics_logger: true, vllm_metrics_logger_interval: 0.5,
               expose_http_server: false}
    vllm_kwargs: {}
    colocated: {enabled: true, resources: {gpus_per_node: null, num_nodes: null}}
data:
  max_input_seq_length: ${policy.max_total_sequence_length}
  shuffle: true
  num_workers: 1
  use_multiple_dataloader: false
  train: {dataset_name: OpenMathInstruct-2, split_validation_size: 0.05}
  validation: null
  default: {prompt_file: cot.txt, system_prompt_file: null, processor: math_hf_data_processor, env_name: math}
env:
  math: {num_workers: 8, math_verify_impl: hf_math_verify}
  reward_model:
    enabled: true
    model_name: Skywork/Skywork-Reward-V2-Qwen3-0.6B
    tokenizer: {name: "${env.reward_model.model_name}"}
    precision: bfloat16
    batch_size: ${policy.train_micro_batch_size}
    checkpoint_path: null
    max_model_len: 2048
    resources: {gpus_per_node: 1, num_nodes: 1}
    dtensor_cfg: {_v2: true, enabled: true}
logger: {log_dir: logs, wandb_enabled: false, monitor_gpus: false}
cluster: {gpus_per_node: 8, num_nodes: 1}
"""
DIFFERENT = {"policy.generation.backend"}  # vllm there is part of the trainer; here it is a server, to be named


def leaves(data: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {key: data}
    return {k: v for name, item in data.items() for k, v in leaves(item, f"{key}.{name}" if key else name).items()}


@BOTH
def test_nemo_rl_config_for_megatron_is_valid_as_it_stands(folder: Path, tmp_path: Path, standard: Standard) -> None:
    (tmp_path / "theirs.yaml").write_text(NEMO_RL_GRPO)
    standard(folder / "schema.json").validate(
        compose(tmp_path / "theirs.yaml", schema=folder / "schema.json", env={}).data
    )


@BOTH
@pytest.mark.parametrize("section", ["grpo", "loss_fn", "policy", "env.math", "env.reward_model"])
def test_defaults_are_nemo_rls(folder: Path, section: str, tmp_path: Path) -> None:
    """Composed of nothing, our config says what NeMo-RL's says, wherever a key of it has a default here."""
    (tmp_path / "theirs.yaml").write_text(NEMO_RL_GRPO)
    (tmp_path / "empty.yaml").write_text("{}\n")
    given = leaves(yaml.safe_load(NEMO_RL_GRPO))
    schema = load_schema(folder / "schema.json")
    with_default = {".".join(path) for path, part in known_paths(schema) if "default" in part}
    theirs, ours = (
        leaves(compose(tmp_path / f"{name}.yaml", schema=folder / "schema.json", env={}).data)
        for name in ("theirs", "empty")
    )
    keys = {key for key in given if key.startswith(section + ".")} & with_default - DIFFERENT
    keys -= {"policy.model_name", "policy.tokenizer.name"}
    assert len(keys) > 1
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}


# Switched on, what is not implemented: the key, the value that turns it on, a word of the reason.
ON = [
    ("grpo.async_grpo.enabled", "true", "weights"),
    ("grpo.max_rollout_turns", "3", "one answer"),
    ("grpo.adv_estimator.name", "reinforce_plus_plus", "GRPO's"),
    ("grpo.stop_at_validation_metric", "accuracy", "max_num_steps"),
    ("grpo.reward_penalties.penalize_empty_final_answer", "true", "environment"),
    ("policy.dtensor_cfg.enabled", "true", "Megatron"),
    ("policy.sequence_packing.enabled", "true", "padded"),
    ("policy.megatron_cfg.mtp_num_layers", "1", "next token"),
    ("policy.generation.sglang_cfg", "{}", "vLLM"),
    ("policy.generation.trtllm_cfg", "{}", "vLLM"),
    ("policy.generation.refit_transport", "nccl", "safetensors"),
    ("policy.generation.vllm_cfg.logprobs_mode", "raw_logprobs", "temperature"),
    ("policy.generation.mcore_generation_config.expose_http_server", "true", "serve nobody"),
    ("env.math.math_verify_impl", "dapo_math_verify", "math-verify"),
    ("env.use_genrm_compare", "true", "judge"),
    ("env.nemo_gym.is_trajectory_collection", "true", "probe"),
    ("env.reward_model.checkpoint_path", "/weights", "model_name"),
    ("data.use_multiple_dataloader", "true", "one data loader"),
]


@BOTH
@pytest.mark.parametrize(("key", "value", "reason"), ON, ids=[key for key, _, _ in ON])
def test_what_is_not_implemented_is_refused_with_its_reason(folder: Path, key: str, value: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(folder / "config/default.yaml", [f"++{key}={value}"], schema=folder / "schema.json", env={})
    assert f"{key}=" in caught.value.message
    assert "is not implemented: " in caught.value.message
    assert reason in caught.value.message
    assert caught.value.exit_code == 2


# One wrong value for each kind of rule, and a word of what the message says.
WRONG = [
    ("policy.generation.backend=sglang", "megatron, vllm"),
    ("policy.generation.temperature=0", "greater than 0"),
    ("policy.generation.top_p=1.5", "at most 1"),
    ("loss_fn.ratio_clip_c=1", "greater than 1"),
    ("loss_fn.reference_policy_kl_type=k4", "k1, k2, k3"),
    ("loss_fn.truncated_importance_sampling_type=cut", "tis, icepop, seq-mask-tis"),
    ("grpo.num_generations_per_prompt=0", "at least 1"),
    ("grpo.reward_shaping.stop_properly_penalty_coef=2", "at most 1"),
    ("data.train.split_validation_size=1", "less than 1"),
    ("data.default_agent_ref={type: responses_api_agents}", "name is missing"),
    ("env.judge.mode=groupwise", "pairwise, pointwise"),
    ("env.max_failed_rollouts=5", "at most 1"),
]


@BOTH
@pytest.mark.parametrize(("override", "words"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_value_is_refused_with_what_is_allowed(folder: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(folder / "config/default.yaml", [f"++{override}"], schema=folder / "schema.json", env={})
    assert words in f"{caught.value.message} {caught.value.hint}"


ALIASES = [
    ("grpo.adv_estimator.normalize_rewards", "false", "grpo.normalize_rewards", False),
    ("grpo.adv_estimator.use_leave_one_out_baseline", "false", "grpo.use_leave_one_out_baseline", False),
    ("grpo.num_val_generations_per_prompt", "4", "grpo.val_num_generations_per_prompt", 4),
    ("policy.optimizer.lr", "2e-6", "policy.megatron_cfg.optimizer.lr", 2e-6),
    ("env.nemo_gym.genrm_model.responses_api_models.vllm_model.model", "org/judge", "env.judge.model", "org/judge"),
]


@BOTH
@pytest.mark.parametrize(("alias", "text", "key", "value"), ALIASES, ids=[alias for alias, *_ in ALIASES])
def test_other_name_of_a_key_sets_it(folder: Path, alias: str, text: str, key: str, value: Any) -> None:
    data: Any = compose(folder / "config/default.yaml", [f"{alias}={text}"], schema=folder / "schema.json", env={}).data
    assert leaves(data)[key] == value


def test_instances_of_nemo_gym_keep_their_own_keys() -> None:
    instance = "env.nemo_gym.math_with_judge.resources_servers.math_with_judge.should_use_judge"
    data = compose(RLVR / "config/nemo_gym.yaml", [f"+{instance}=false"], schema=RLVR / "schema.json", env={}).data
    assert leaves(data)[instance] is False
