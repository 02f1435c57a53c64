#!/bin/bash
# convert/hf_to_megatron -c default, run hf-to-megatron-default
# What runs on this machine: the job's files, its environment, its command. The script can be kept and started by itself.
# Strict: an error, an unset name or a failed part of a pipe ends it.
set -Eeuo pipefail

# Where we are. Nobody else may read the run's folder: a config may name what is private.
run_dir=.nemotron/runs/hf-to-megatron-default
umask_before=$(umask)
umask 077
mkdir -p "$run_dir"

cat > "$run_dir/"config.yaml <<'END'
output_dir: ./output/rl/hf_to_megatron-default
hf_path: meta-llama/Llama-3.2-1B-Instruct
megatron_path: ./output/rl/hf_to_megatron-default/checkpoints
tensor_model_parallel_size: 1
pipeline_model_parallel_size: 1
precision: null
device: cpu
compare_logits: auto
max_logit_difference: 0.0001
probe_text: 'The quick brown fox jumps over the lazy dog. 3 1 4 1 5 -> 1 1 3 4 5

  Was it a car or a cat I saw? f(x) = x**2 + 1; naïve café, 東京.'
trust_remote_code: false
cluster:
  num_nodes: 1
  gpus_per_node: 0
  procs_per_node: 1
END
umask "$umask_before"

# Launch.
exec python3 -m nemotron_launch.trainer.spawn --procs 1 --output-dir output/rl/hf_to_megatron-default -- steps/convert/hf_to_megatron/run.py --config .nemotron/runs/hf-to-megatron-default/config.yaml
