#!/bin/bash
# rl/nemo_rl/rlvr -c nemo_gym, run rlvr-nemo-gym
# What runs on this machine: the job's files, its environment, its command. The script can be kept and started by itself.
# Strict: an error, an unset name or a failed part of a pipe ends it.
set -Eeuo pipefail
say() { echo "nemotron: $*" >&2; }
fail() { say "error: $1"; exit "${2:-1}"; }

# Where we are. Nobody else may read the run's folder: a config may name what is private.
run_dir=.nemotron/runs/rlvr-nemo-gym
umask_before=$(umask)
umask 077
mkdir -p "$run_dir"

cat > "$run_dir/"config.yaml <<'END'
output_dir: ./output/rl/rlvr-nemo_gym
grpo:
  num_prompts_per_step: 16
  num_generations_per_prompt: 8
  max_rollout_turns: 1
  max_num_epochs: 20
  max_num_steps: 500
  normalize_rewards: true
  use_leave_one_out_baseline: true
  val_period: 25
  val_start_at: -1
  val_at_start: true
  val_at_end: true
  max_val_samples: 256
  val_batch_size: 256
  val_num_generations_per_prompt: 2
  val_greedy: true
  seed: 42
  overlong_filtering: false
  advantage_clip_low: -50
  advantage_clip_high: 50
  use_dynamic_sampling: false
  dynamic_sampling_max_gen_batches: 10
  batch_multiplier: 1
  skip_reference_policy_logprobs_calculation: false
  reference_kl_period: 10
  reference: offloaded
  seq_logprob_error_threshold: 2
  probe: null
  reward_shaping:
    enabled: false
    overlong_buffer_length: 128
    overlong_buffer_penalty: 1
    max_response_length: 4096
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
  use_importance_sampling_correction: true
  truncated_importance_sampling_type: tis
  truncated_importance_sampling_ratio: 5
  truncated_importance_sampling_ratio_min: null
  positive_example_nll_weight: 0.0
policy:
  model_name: meta-llama/Llama-3.2-1B-Instruct
  architecture: null
  tokenizer:
    name: meta-llama/Llama-3.2-1B-Instruct
    chat_template: default
    chat_template_kwargs: null
  train_global_batch_size: 128
  train_micro_batch_size: 4
  logprob_batch_size: 8
  max_total_sequence_length: 4096
  make_sequence_length_divisible_by: 1
  precision: bfloat16
  device: auto
  shared_prompt: true
  generation_batch_size: 32
  generation:
    backend: megatron
    server: null
    max_new_tokens: 1024
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
    train_mb_tokens: 16384
    logprob_mb_tokens: 32768
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
    pipeline_dtype: bfloat16
    num_layers_in_first_pipeline_stage: null
    num_layers_in_last_pipeline_stage: null
    activation_checkpointing: false
    recompute_granularity: full
    recompute_modules: null
    optimizer:
      optimizer: adam
      lr: 1.0e-06
      min_lr: 1.0e-07
      weight_decay: 0
      adam_beta1: 0.9
      adam_beta2: 0.999
      adam_eps: 1.0e-08
      clip_grad: 1.0
      bf16: null
      params_dtype: float32
      use_distributed_optimizer: true
    scheduler:
      lr_decay_style: constant
      lr_decay_iters: 1000
      lr_warmup_iters: 10
      lr_warmup_init: 1.0e-07
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
    dataset_name: NemoGymDataset
    data_path: nvidia/Nemotron-RL-math-OpenMathReasoning
    split: train
  validation:
    dataset_name: NemoGymDataset
    data_path: nvidia/Nemotron-RL-math-OpenMathReasoning
    split: validation
  default:
    env_name: nemo_gym
  max_input_seq_length: 3072
  max_bad_rows: 0.01
  allow_train_as_validation: false
  default_agent_ref: math_with_judge_simple_agent
  shuffle: true
  manifest_path: null
env:
  should_use_nemo_gym: true
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
    precision: bfloat16
    batch_size: 4
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
    server: gym
    config_paths:
    - responses_api_models/vllm_model/configs/vllm_model_for_training.yaml
    - resources_servers/math_with_judge/configs/math_with_judge.yaml
    - resources_servers/mcqa/configs/mcqa.yaml
    timeout: 120
    retries: 3
    concurrency: 64
    ready_timeout: 1800
checkpointing:
  enabled: true
  checkpoint_dir: ./output/rl/rlvr-nemo_gym/checkpoints
  pretrained_checkpoint:
    path: null
    format: auto
  allow_config_change: false
  metric_name: val:accuracy
  higher_is_better: true
  keep_top_k: 3
  save_period: 25
  ft_save_period: null
  ft_keep_latest_k: null
  checkpoint_must_save_by: null
  save_optimizer: true
logger:
  log_dir: ./output/rl/rlvr-nemo_gym/logs
  wandb_enabled: false
  tensorboard_enabled: false
  mlflow_enabled: false
  num_val_samples_to_print: 0
  wandb:
    project: grpo
    name: rlvr
  mlflow:
    experiment_name: grpo
    run_name: rlvr
cluster:
  num_nodes: 1
  gpus_per_node: 8
  procs_per_node: null
END
umask "$umask_before"

# Services: started before the trainer, stopped with it; the death of one ends the run.
node=0
export NEMOTRON_LOG_DIR=$run_dir/logs
mkdir -p "$NEMOTRON_LOG_DIR"
trainer=
declare -A services=()
finish() {
    local code=$? name
    trap - EXIT
    trap '' TERM INT HUP USR1 USR2
    set +e
    exec 2> /dev/null
    [[ -z $trainer ]] || kill -KILL "$trainer"
    for name in "${!services[@]}"; do
        kill -TERM -- "-${services[$name]}"
    done
    for name in "${!services[@]}"; do
        for _ in {1..20}; do kill -0 -- "-${services[$name]}" || break; sleep 0.5; done
        kill -KILL -- "-${services[$name]}"
    done
    exit "$code"
}
trap finish EXIT
trap 'exit 85' TERM INT HUP USR1
serve() { # name command…
    setsid "${@:2}" > "$NEMOTRON_LOG_DIR/$1-$node.log" 2>&1 &
    services[$1]=$!
}
lives() { # name
    kill -0 "${services[$1]}" 2> /dev/null && return
    say "error: service $1 ended; the end of its log:"
    tail -n 25 "$NEMOTRON_LOG_DIR/$1-$node.log"
    return 1
}
answers() { # address path: 200 to a GET, or, without a path, an open port
    # shellcheck disable=SC2016
    timeout 5 bash -c 'exec 3<> "/dev/tcp/${1%:*}/${1##*:}" && [[ -z $2 ]] && exit 0
        printf "GET %s HTTP/1.0\r\nHost: %s\r\n\r\n" "$2" "$1" >&3 && read -r _ status _ <&3 && [[ $status == 200* ]]' \
        _ "$@" 2> /dev/null
}
await() { # name address path seconds
    local end=$((SECONDS + $4))
    until answers "$2" "$3"; do
        [[ -z ${services[$1]-} ]] || lives "$1" || exit 1
        ((SECONDS < end)) || fail "service $1 was not ready at $2 within $4 s"
        sleep 1
    done
    say "service $1 is ready at $2"
}
export NEMOTRON_SERVICE_GYM=127.0.0.1:11000
serve gym env CUDA_VISIBLE_DEVICES= ng_run '+config_paths=['"'"'responses_api_models/vllm_model/configs/vllm_model_for_training.yaml'"'"', '"'"'resources_servers/math_with_judge/configs/math_with_judge.yaml'"'"', '"'"'resources_servers/mcqa/configs/mcqa.yaml'"'"']' +head_server.host=0.0.0.0 +head_server.port=11000 +policy_base_url=http://127.0.0.1:9/v1 +policy_api_key=none +policy_model_name=meta-llama/Llama-3.2-1B-Instruct
await gym "$NEMOTRON_SERVICE_GYM" /server_instances 1800

# Launch. A signal goes to the trainer, which saves and ends with 85.
python3 -m nemotron_launch.trainer.spawn --procs 8 --output-dir output/rl/rlvr-nemo_gym -- steps/rl/nemo_rl/rlvr/train.py --config .nemotron/runs/rlvr-nemo-gym/config.yaml &
trainer=$!
tell() { kill -s "$1" "$trainer" 2> /dev/null || true; }
trap 'tell TERM' TERM INT HUP
trap 'tell USR1' USR1
trap 'tell USR2' USR2
service_ended=
while kill -0 "$trainer" 2> /dev/null; do
    sleep 0.5 &
    wait $! || true
    for name in "${!services[@]}"; do
        [[ -n $service_ended ]] || lives "$name" || { service_ended=yes && tell TERM; }
    done
done
trap '' TERM INT HUP USR1 USR2
code=0
wait "$trainer" || code=$?
trainer=
[[ -z $service_ended ]] || code=1
exit "$code"
