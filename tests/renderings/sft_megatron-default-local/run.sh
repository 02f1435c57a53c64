#!/bin/bash
# sft/megatron -c default, run megatron-default
# What runs on this machine: the job's files, its environment, its command. The script can be kept and started by itself.
# Strict: an error, an unset name or a failed part of a pipe ends it.
set -Eeuo pipefail

# Where we are. Nobody else may read the run's folder: a config may name what is private.
run_dir=.nemotron/runs/megatron-default
umask_before=$(umask)
umask 077
mkdir -p "$run_dir"

cat > "$run_dir/"config.yaml <<'END'
output_dir: ./output/rl/sft-default
sft:
  max_num_epochs: 1
  max_num_steps: 1000
  val_period: 100
  val_batches: 8
  val_global_batch_size: 32
  val_micro_batch_size: 1
  val_at_start: true
  val_at_end: true
  seed: 42
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
  train_global_batch_size: 128
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
      lr: 5.0e-06
      min_lr: 5.0e-07
      weight_decay: 0.1
      adam_beta1: 0.9
      adam_beta2: 0.98
      adam_eps: 1.0e-05
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
      start_weight_decay: 0.1
      end_weight_decay: 0.1
      weight_decay_incr_style: constant
    distributed_data_parallel_config:
      grad_reduce_in_fp32: false
      overlap_grad_reduce: true
data:
  train:
    split: train_sft
  validation:
    split: test_sft
  default:
    data_path: HuggingFaceH4/ultrachat_200k
    chat_key: messages
  max_input_seq_length: 4096
  max_bad_rows: 0.01
  add_bos: true
  add_eos: true
  add_generation_prompt: false
  shuffle: true
  manifest_path: null
checkpointing:
  enabled: true
  checkpoint_dir: ./output/rl/sft-default/checkpoints
  pretrained_checkpoint:
    path: null
    format: auto
  allow_config_change: false
  metric_name: val:validation-default_loss
  higher_is_better: false
  keep_top_k: 3
  save_period: 100
  ft_save_period: null
  ft_keep_latest_k: null
  checkpoint_must_save_by: null
  save_optimizer: true
logger:
  log_dir: ./output/rl/sft-default/logs
  wandb_enabled: false
  tensorboard_enabled: false
  mlflow_enabled: false
  num_val_samples_to_print: 0
  wandb:
    project: sft
    name: sft
  mlflow:
    experiment_name: sft
    run_name: sft
cluster:
  num_nodes: 1
  gpus_per_node: 8
  procs_per_node: null
END
umask "$umask_before"

# Launch.
exec python3 -m nemotron_launch.trainer.spawn --procs 8 --output-dir output/rl/sft-default -- steps/sft/megatron/train.py --config .nemotron/runs/megatron-default/config.yaml
