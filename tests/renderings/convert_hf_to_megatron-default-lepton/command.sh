#!/bin/bash
# convert/hf_to_megatron -c default, profile lepton, run hf-to-megatron-default
# What each replica of the Lepton job runs; LEPTON_… variables say which one it is.
# Strict: an error, an unset name or a failed part of a pipe ends the attempt.
set -Eeuo pipefail
say() { echo "$(date +%FT%T) node ${LEPTON_JOB_WORKER_INDEX:-0}: $*"; }
fail() { say "error: $1"; exit "${2:-1}"; }

# Where we are. Each attempt has a log folder of its own, so that none overwrites another's.
run_dir=/mnt/shared/nemotron/hf-to-megatron-default
workdir=/mnt/shared/nemotron
node=${LEPTON_JOB_WORKER_INDEX:-0}
attempt=${LEPTON_JOB_FAILURE_COUNT:-0}
export NEMOTRON_LOG_DIR=$run_dir/logs/attempt-$attempt
mkdir -p "$NEMOTRON_LOG_DIR" "$workdir"
exec 3>&1 > >(trap '' TERM INT HUP USR1; exec tee -a "$NEMOTRON_LOG_DIR/node-$node.log") 2>&1
copy=$!
say "run hf-to-megatron-default, attempt $attempt, node $node of 1"

# The end of an attempt: nothing is left running, and the exit code is where a client looks for it.
trainer=
declare -A services=()
finish() {
    local code=$? name
    trap - ERR EXIT
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
    echo "$code" > "$NEMOTRON_LOG_DIR/node-$node.exit_code.tmp"
    mv "$NEMOTRON_LOG_DIR/node-$node.exit_code.tmp" "$NEMOTRON_LOG_DIR/node-$node.exit_code"
    exec >&3
    for _ in {1..50}; do kill -0 "$copy" || break; sleep 0.1; done
    echo "nemotron-exit 103fed05b5263226 attempt=$attempt node=$node code=$code"
    exit "$code"
}
trap finish EXIT
trap 'say "asked to stop"; exit 85' TERM INT HUP USR1

# Who our peers are.
given=${LEPTON_JOB_TOTAL_WORKERS:-1}
((given == 1)) || fail "the job needs 1 replicas, Lepton gave it $given"
export NNODES=1 NODE_RANK=$node

# Config and code, which the job's envs carry in base64: the very bytes that were compiled, or nothing starts.
joined() { # variable parts
    local i part
    for ((i = 0; i < $2; i++)); do part=$1_$i; echo "${!part-}"; done | base64 -d
}
verify() { # file sha256 name
    local found
    found=$(sha256sum < "$1" | cut -c -64)
    [[ $found == "$2" ]] || fail "$3 is not what was sent: its SHA-256 is $found, not $2"
}
place() { # file mode sha256 variable parts
    local part=$run_dir/$1.node-$node
    mkdir -p "${part%/*}"
    (umask 077 && joined "$4" "$5" > "$part") || true
    verify "$part" "$3" "$1"
    chmod "$2" "$part"
    mv "$part" "$run_dir/$1"
}
place config.yaml 600 a1f6834c0f1e2d876666f0d054dbe650c37d58279be80f1dd03c93527bf25986 NEMOTRON_FILE_0 1
if [[ ! -e $run_dir/code ]]; then
    place code.tar.gz 600 0000000000000000000000000000000000000000000000000000000000000000 NEMOTRON_BUNDLE 1
    fresh=$run_dir/.code.node-$node
    rm -rf "$fresh"
    mkdir "$fresh"
    tar -xzf "$run_dir/code.tar.gz" -C "$fresh" --no-same-owner
    echo 0000000000000000000000000000000000000000000000000000000000000000 > "$fresh/.sha256"
    # Another replica may have been faster: then the folder is there, and whole.
    mv -T "$fresh" "$run_dir/code" 2> /dev/null || rm -rf "$fresh"
fi
[[ $(< "$run_dir/code/.sha256") == 0000000000000000000000000000000000000000000000000000000000000000 ]] || fail "$run_dir/code holds other code: use another run id"
unset "${!NEMOTRON_FILE_@}" "${!NEMOTRON_BUNDLE_@}"

# Places that can be written: an image may have none. Compilers' caches stay on the node, models beside the runs.
scratch=${TMPDIR:-/tmp}/nemotron-$(id -u)
mkdir -p -m 700 "$scratch" && [[ -O $scratch ]] || scratch=$(mktemp -d)
[[ -w ${HOME:-} ]] || export HOME=$scratch/home
mkdir -p "$HOME"
export HF_HOME=${HF_HOME-$workdir/hf}
export XDG_CACHE_HOME=${XDG_CACHE_HOME-$scratch/cache} TRITON_CACHE_DIR=${TRITON_CACHE_DIR-$scratch/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR-$scratch/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR-$scratch/extensions}
export PYTHONPATH=$run_dir/code${PYTHONPATH:+:$PYTHONPATH}
cd "$workdir"

# What this image lacks shows now, not after the models are loaded.
if ((node < 1)); then
    python-MegatronPolicyWorker -m nemotron_launch.trainer.doctor --require train || fail "the trainer cannot run in this image"
fi

# Launch. A signal goes to the trainer, which saves and ends with 85.
python-MegatronPolicyWorker -m nemotron_launch.trainer.spawn --procs 1 --output-dir /mnt/shared/nemotron/output/rl/hf_to_megatron-default -- /mnt/shared/nemotron/hf-to-megatron-default/code/steps/convert/hf_to_megatron/run.py --config /mnt/shared/nemotron/hf-to-megatron-default/config.yaml &
trainer=$!
tell() { kill -s "$1" "$trainer" 2> /dev/null || true; }
trap 'tell TERM' TERM INT HUP
trap 'tell USR1' USR1
trap 'tell USR2' USR2

# Lepton knows no time limit, so it is kept here: 14400 s, of which the last 300 s are to save.
save_at=14100
stop_at=14400
told=
while kill -0 "$trainer" 2> /dev/null; do
    sleep 0.5 &
    wait $! || true
    if ((SECONDS >= stop_at + 30)); then
        tell KILL
    elif ((SECONDS >= stop_at)) && [[ $told != TERM ]]; then
        told=TERM
        say "the trainer has 30 s to end"
        tell TERM
    elif ((SECONDS >= save_at)) && [[ -z $told ]]; then
        told=USR1
        say "300 s until the time limit: the trainer shall save and stop"
        tell USR1
    fi
done
trap '' TERM INT HUP USR1 USR2
code=0
wait "$trainer" || code=$?
trainer=
exit "$code"
