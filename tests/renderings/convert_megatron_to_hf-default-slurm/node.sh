#!/bin/bash
# convert/megatron_to_hf -c default, profile slurm
# On every node, in the container: sets the environment, then runs the command that it is given.
set -Eeuo pipefail
run_dir=/lustre/your_account/nemotron/megatron-to-hf-default
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
export PYTHONPATH=$run_dir/code${PYTHONPATH:+:$PYTHONPATH}

# Secrets (HF_TOKEN, WANDB_API_KEY), never traced.
{ set +x; } 2> /dev/null
source "$run_dir/secrets.env"

# Signals are the command's affair; this shell outlives them, and knows that they came.
asked=
trap 'asked=1' USR1 TERM
trap : USR2 INT HUP

# What this image lacks shows now, not after the models are loaded.
python-MegatronPolicyWorker -m nemotron_launch.trainer.doctor --require train

# The command. One that a signal ended before it could listen has nothing to save: it is resumed all the same.
code=0
"$@" || code=$?
if [[ -n $asked ]] && ((code == 138 || code == 143)); then code=85; fi
((code == 0)) || (set -o noclobber && echo "$code $node" > "$NEMOTRON_LOG_DIR/first_exit") 2> /dev/null || true
echo "$code" > "$NEMOTRON_LOG_DIR/node-$NODE_RANK.exit_code"
# "Saved, resume me" is no failure: srun would kill the nodes that are still at it.
((code != 85)) || exit 0
# After a failure it does kill them: a moment for their last words.
((code == 0 || NNODES == 1)) || sleep 5
exit "$code"
