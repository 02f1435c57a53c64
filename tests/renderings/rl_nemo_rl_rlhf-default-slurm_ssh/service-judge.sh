#!/bin/bash
# service judge of rl/nemo_rl/rlhf -c default, profile slurm_ssh
# On every node: sets the environment, then runs the command that it is given.
set -Eeuo pipefail
run_dir=/lustre/your_account/nemotron/rlhf-default
node=${SLURMD_NODENAME:-$HOSTNAME}
cd /lustre/your_account/nemotron

# Places that can be written: an image may have none. Compilers' caches stay on the node, models are shared.
scratch=${TMPDIR:-/tmp}/nemotron-$(id -u)
mkdir -m 700 "$scratch" 2> /dev/null || [[ -O $scratch ]] || scratch=$(mktemp -d)
[[ -w ${HOME:-} ]] || export HOME=$scratch/home
mkdir -p "$HOME"
export HF_HOME=/lustre/your_account/nemotron/hf
export XDG_CACHE_HOME=$scratch/cache TRITON_CACHE_DIR=$scratch/triton
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TORCH_EXTENSIONS_DIR=$scratch/extensions

# Our variables, here and not before: an image's own would win.
export NODE_RANK=${SLURM_NODEID:-0}

# Secrets (HF_TOKEN, WANDB_API_KEY), never traced.
{ set +x; } 2> /dev/null
source "$run_dir/secrets.env"

exec "$@"
