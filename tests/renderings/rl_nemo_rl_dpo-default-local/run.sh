#!/bin/bash
# rl/nemo_rl/dpo -c default, run dpo-default
# What runs on this machine: the job's files, its environment, its command. The script can be kept and started by itself.
# Strict: an error, an unset name or a failed part of a pipe ends it.
set -Eeuo pipefail

# Where we are. Nobody else may read the run's folder: a config may name what is private.
run_dir=.nemotron/runs/dpo-default
umask_before=$(umask)
umask 077
mkdir -p "$run_dir"

cat > "$run_dir/"config.yaml <<'END'
output_dir: ./output/rl/dpo-default
dpo:
  max_num_epochs: 1
  max_num_steps: 500
  val_period: 50
  val_batches: 8
  val_global_batch_size: 32
  val_micro_batch_size: 1
  val_at_start: true
  val_at_end: true
  seed: 42
  reference_policy_kl_penalty: 0.05
  preference_average_log_probs: false
  sft_average_log_probs: false
  preference_loss_weight: 1
  sft_loss_weight: 0
  reference: stored
  val_generation:
    num_prompts: 0
    max_new_tokens: 128
    temperature: 1.0
policy:
  model_name: meta-llama/Llama-3.2-1B-Instruct
  architecture: null
  tokenizer:
    name: meta-llama/Llama-3.2-1B-Instruct
    chat_template: default
    chat_template_kwargs: null
  train_global_batch_size: 32
  train_micro_batch_size: 1
  logprob_batch_size: null
  max_total_sequence_length: 4096
  make_sequence_length_divisible_by: 1
  precision: bfloat16
  device: auto
  shared_prompt: true
  generation: null
  dynamic_batching:
    enabled: false
    train_mb_tokens: null
    logprob_mb_tokens: null
    sequence_length_round: null
  megatron_cfg:
    enabled: true
    env_vars: {}
    tensor_model_parallel_size: 1
    pipeline_model_parallel_size: 1
    context_parallel_size: 1
    expert_model_parallel_size: 1
    expert_tensor_parallel_size: 1
    sequence_parallel: true
    pipeline_dtype: bfloat16
    num_layers_in_first_pipeline_stage: null
    num_layers_in_last_pipeline_stage: null
    activation_checkpointing: false
    recompute_granularity: full
    recompute_modules: null
    optimizer:
      optimizer: adam
      lr: 5.0e-07
      min_lr: 5.0e-08
      weight_decay: 0.01
      adam_beta1: 0.9
      adam_beta2: 0.98
      adam_eps: 1.0e-08
      clip_grad: 1.0
      bf16: null
      params_dtype: float32
      use_distributed_optimizer: true
    scheduler:
      lr_decay_style: cosine
      lr_decay_iters: null
      lr_warmup_iters: 50
      lr_warmup_init: 0
      lr_wsd_decay_style: exponential
      lr_wsd_decay_iters: null
      start_weight_decay: 0.01
      end_weight_decay: 0.01
      weight_decay_incr_style: constant
    distributed_data_parallel_config:
      grad_reduce_in_fp32: false
      overlap_grad_reduce: true
data:
  train:
    dataset_name: HelpSteer3
    split: train
  validation:
    dataset_name: HelpSteer3
    split: validation
  default:
    prompt_key: prompt
    chosen_key: chosen
    rejected_key: rejected
  val_data_paths: {}
  max_input_seq_length: 4096
  max_bad_rows: 0.2
  shuffle: true
  manifest_path: null
checkpointing:
  enabled: true
  checkpoint_dir: ./output/rl/dpo-default/checkpoints
  pretrained_checkpoint:
    path: null
    format: auto
  allow_config_change: false
  metric_name: val:validation-default_loss
  higher_is_better: false
  keep_top_k: 3
  save_period: 50
  ft_save_period: null
  ft_keep_latest_k: null
  checkpoint_must_save_by: null
  save_optimizer: true
logger:
  log_dir: ./output/rl/dpo-default/logs
  wandb_enabled: false
  tensorboard_enabled: false
  mlflow_enabled: false
  num_val_samples_to_print: 0
  wandb:
    project: dpo
    name: dpo
  mlflow:
    experiment_name: dpo
    run_name: dpo
cluster:
  num_nodes: 1
  gpus_per_node: 8
  procs_per_node: null
END
umask "$umask_before"

# Launch.
exec python3 -m nemotron_launch.trainer.spawn --procs 8 --output-dir output/rl/dpo-default -- steps/rl/nemo_rl/dpo/train.py --config .nemotron/runs/dpo-default/config.yaml
