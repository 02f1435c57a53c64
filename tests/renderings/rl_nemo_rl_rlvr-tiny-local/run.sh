#!/bin/bash
# rl/nemo_rl/rlvr -c tiny, run rlvr-tiny
# What runs on this machine: the job's files, its environment, its command. The script can be kept and started by itself.
# Strict: an error, an unset name or a failed part of a pipe ends it.
set -Eeuo pipefail

# Where we are. Nobody else may read the run's folder: a config may name what is private.
run_dir=.nemotron/runs/rlvr-tiny
umask_before=$(umask)
umask 077
mkdir -p "$run_dir"

cat > "$run_dir/"config.yaml <<'END'
output_dir: ./output/rl/rlvr-tiny
grpo:
  num_prompts_per_step: 32
  num_generations_per_prompt: 8
  max_rollout_turns: 1
  max_num_epochs: 10
  max_num_steps: 120
  normalize_rewards: true
  use_leave_one_out_baseline: true
  val_period: 40
  val_start_at: -1
  val_at_start: true
  val_at_end: true
  max_val_samples: 120
  val_batch_size: 120
  val_num_generations_per_prompt: 4
  val_greedy: true
  seed: 42
  overlong_filtering: false
  advantage_clip_low: null
  advantage_clip_high: null
  use_dynamic_sampling: false
  dynamic_sampling_max_gen_batches: 10
  batch_multiplier: 1
  skip_reference_policy_logprobs_calculation: false
  reference_kl_period: 5
  reference: offloaded
  seq_logprob_error_threshold: null
  probe: null
  reward_shaping:
    enabled: false
    overlong_buffer_length: 128
    overlong_buffer_penalty: 1
    max_response_length: 64
    stop_properly_penalty_coef: null
  reward_scaling:
    enabled: false
    source_min: 0.0
    source_max: 1.0
    target_min: 0.0
    target_max: 1.0
  adv_estimator:
    name: grpo
  async_grpo:
    enabled: false
  invalid_tool_call_advantage: null
loss_fn:
  reference_policy_kl_penalty: 0
  reference_policy_kl_type: k3
  kl_input_clamp_value: 20.0
  kl_output_clamp_value: 10.0
  use_on_policy_kl_approximation: false
  use_kl_in_reward: false
  ratio_clip_min: 0.2
  ratio_clip_max: 0.28
  ratio_clip_c: null
  token_level_loss: true
  sequence_level_importance_ratios: false
  use_cispo: false
  disable_ppo_ratio: false
  force_on_policy_ratio: true
  use_importance_sampling_correction: false
  truncated_importance_sampling_type: null
  truncated_importance_sampling_ratio: null
  truncated_importance_sampling_ratio_min: null
  positive_example_nll_weight: 0.0
policy:
  model_name: null
  architecture:
    num_layers: 2
    hidden_size: 128
    num_attention_heads: 4
    num_key_value_heads: 2
    intermediate_size: 256
    vocab_size: null
    head_dim: null
    rope_theta: 10000.0
    rope_scaling: null
    rms_norm_eps: 1.0e-06
    tie_word_embeddings: true
    qkv_bias: false
    qk_norm: false
    max_position_embeddings: 2048
    initializer_range: 0.02
  tokenizer:
    name: bytes
    chat_template: default
    chat_template_kwargs: null
  train_global_batch_size: 256
  train_micro_batch_size: 128
  logprob_batch_size: 256
  max_total_sequence_length: 64
  make_sequence_length_divisible_by: 1
  precision: float32
  device: cpu
  shared_prompt: true
  generation_batch_size: 512
  generation:
    backend: megatron
    server: null
    max_new_tokens: 16
    temperature: 1.0
    top_p: 1.0
    top_k: null
    val_temperature: 1.0
    val_top_p: 1.0
    val_top_k: null
    stop_token_ids: null
    stop_strings: null
  dynamic_batching:
    enabled: false
    train_mb_tokens: 8192
    logprob_mb_tokens: 16384
    sequence_length_round: 64
  megatron_cfg:
    enabled: true
    env_vars: {}
    tensor_model_parallel_size: 1
    pipeline_model_parallel_size: 1
    context_parallel_size: 1
    expert_model_parallel_size: 1
    expert_tensor_parallel_size: 1
    sequence_parallel: true
    pipeline_dtype: float32
    num_layers_in_first_pipeline_stage: null
    num_layers_in_last_pipeline_stage: null
    activation_checkpointing: false
    recompute_granularity: full
    recompute_modules: null
    optimizer:
      optimizer: adam
      lr: 0.0003
      min_lr: 0
      weight_decay: 0
      adam_beta1: 0.9
      adam_beta2: 0.999
      adam_eps: 1.0e-08
      clip_grad: 1.0
      bf16: null
      params_dtype: float32
      use_distributed_optimizer: true
    scheduler:
      lr_decay_style: cosine
      lr_decay_iters: 1000
      lr_warmup_iters: 0
      lr_warmup_init: 5.0e-07
      lr_wsd_decay_style: exponential
      lr_wsd_decay_iters: null
      start_weight_decay: 0
      end_weight_decay: 0
      weight_decay_incr_style: constant
    distributed_data_parallel_config:
      grad_reduce_in_fp32: false
      overlap_grad_reduce: true
data:
  train:
    data_path: step://data/train.jsonl
  validation:
    data_path: step://data/validation.jsonl
  default:
    env_name: exact
  max_input_seq_length: 64
  max_bad_rows: 0.01
  allow_train_as_validation: false
  default_agent_ref: null
  shuffle: true
  manifest_path: null
env:
  should_use_nemo_gym: false
  max_failed_rollouts: 0.05
  allow_policy_as_judge: false
  math:
    num_workers: 8
    math_verify_impl: hf_math_verify
    verifier_type: math
    timeout: 10
  code:
    num_workers: 8
    timeout: 10
    memory_mib: 1024
    max_processes: 16
    max_output_kib: 1024
    allow_unisolated: false
  verifiers:
    num_workers: 8
    timeout: 10
  reward_model:
    model_name: Skywork/Skywork-Reward-V2-Qwen3-0.6B
    tokenizer:
      name: Skywork/Skywork-Reward-V2-Qwen3-0.6B
      chat_template: default
    device: auto
    precision: float32
    batch_size: 128
    max_model_len: 2048
  judge:
    model: null
    server: null
    mode: pairwise
    comparison_strategy: circular
    num_judges_per_comparison: 1
    num_rollouts_per_prompt: 8
    aggregator_method: simple_tiebreaker
    default_score: 3.0
    default_ranking: 3.5
    prompt_file: null
    principle: null
    score_pattern: null
    max_output_tokens: 4096
    temperature: 0.6
    top_p: 0.95
    concurrency: 64
    timeout: 600
    retries: 3
    cache: true
    max_requests: null
    api_key_env: null
  nemo_gym:
    server: null
    config_paths: []
    timeout: 120
    retries: 3
    concurrency: 64
    ready_timeout: 1800
checkpointing:
  enabled: true
  checkpoint_dir: ./output/rl/rlvr-tiny/checkpoints
  pretrained_checkpoint:
    path: ./output/rl/sft-tiny/checkpoints
    format: auto
  allow_config_change: false
  metric_name: val:accuracy
  higher_is_better: true
  keep_top_k: 2
  save_period: 40
  ft_save_period: null
  ft_keep_latest_k: null
  checkpoint_must_save_by: null
  save_optimizer: true
logger:
  log_dir: ./output/rl/rlvr-tiny/logs
  wandb_enabled: false
  tensorboard_enabled: false
  mlflow_enabled: false
  num_val_samples_to_print: 3
  wandb:
    project: grpo
    name: rlvr
  mlflow:
    experiment_name: grpo
    run_name: rlvr
cluster:
  num_nodes: 1
  gpus_per_node: 0
  procs_per_node: 1
END
umask "$umask_before"

# Launch.
exec python3 -m nemotron_launch.trainer.spawn --procs 1 --output-dir output/rl/rlvr-tiny -- steps/rl/nemo_rl/rlvr/train.py --config .nemotron/runs/rlvr-tiny/config.yaml
