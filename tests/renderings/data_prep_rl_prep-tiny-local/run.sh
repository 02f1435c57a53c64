#!/bin/bash
# data_prep/rl_prep -c tiny, run rl-prep-tiny
# What runs on this machine: the job's files, its environment, its command. The script can be kept and started by itself.
# Strict: an error, an unset name or a failed part of a pipe ends it.
set -Eeuo pipefail

# Where we are. Nobody else may read the run's folder: a config may name what is private.
run_dir=.nemotron/runs/rl-prep-tiny
umask_before=$(umask)
umask 077
mkdir -p "$run_dir"

cat > "$run_dir/"config.yaml <<'END'
output_dir: ./output/rl/rl_prep-tiny
manifest_path: ./output/rl/rl_prep-tiny/manifest.json
blend_path: step://data/blend-dpo.yaml
target: dpo
num_shards_per_split: 1
compression: none
max_rows: null
validation_size: 0
seed: 42
dedup:
  exact: true
  near: false
  near_threshold: 0.8
  by: row
leakage: drop
tokenizer:
  name: bytes
  chat_template: default
  chat_template_kwargs: null
max_length: 64
max_bad_rows: 0.05
resolve_hf_placeholders: true
offline: null
cache_dir: null
num_workers: 1
cluster:
  num_nodes: 1
  gpus_per_node: 0
  procs_per_node: null
END
umask "$umask_before"

# Launch.
exec python3 steps/data_prep/rl_prep/run.py --config .nemotron/runs/rl-prep-tiny/config.yaml
