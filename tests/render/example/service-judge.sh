#!/bin/bash
# service judge of rl/nemo_rl/dpo -c default, profile cluster
# On every node: sets the environment, then runs the command that it is given.
set -Eeuo pipefail
run_dir=/lustre/team/jobs/dpo-llama-20260101-1a2b3c
node=${SLURMD_NODENAME:-$HOSTNAME}
cd /lustre/team/jobs

# Places that can be written: an image may have none. Compilers' caches stay on the node, models are shared.
scratch=${TMPDIR:-/tmp}/nemotron-$(id -u)
mkdir -m 700 "$scratch" 2> /dev/null || [[ -O $scratch ]] || scratch=$(mktemp -d)
[[ -w ${HOME:-} ]] || export HOME=$scratch/home
mkdir -p "$HOME"
export HF_HOME=/lustre/team/jobs/hf
export XDG_CACHE_HOME=$scratch/cache TRITON_CACHE_DIR=$scratch/triton
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TORCH_EXTENSIONS_DIR=$scratch/extensions

# Our variables, here and not before: an image's own would win.
export NCCL_DEBUG=WARN
export NOTE='it'"'"'s ours'
export NODE_RANK=${SLURM_NODEID:-0}

# Secrets (HF_TOKEN), never traced.
{ set +x; } 2> /dev/null
source "$run_dir/secrets.env"

# The profile's setup commands; one that fails ends the attempt.
trap 'echo "error: $node: setup: ${BASH_COMMAND} ended with $?" >&2' ERR
set +u
source "$run_dir/setup.sh"
set -u
trap - ERR

exec "$@"
