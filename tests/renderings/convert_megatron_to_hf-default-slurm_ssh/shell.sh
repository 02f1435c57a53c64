#!/bin/bash
# A terminal on the first node of a job of this run, in its container:  bash shell.sh JOB
set -euo pipefail
job=$(squeue --noheader --jobs="$1" --states=RUNNING --format=%A 2> /dev/null | head -n 1) || job=
[[ -n $job ]] || { echo "error: job $1 does not run now" >&2; exit 1; }
image=/lustre/your_account/nemotron/images/nvcr.io+nvidia+nemo-rl+v0.6.0.sqsh
[[ -e $image ]] || image='docker://nvcr.io#nvidia/nemo-rl:v0.6.0'
exec srun --jobid="$job" --overlap --pty \
    --nodes=1 \
    --ntasks=1 \
    --mpi=none \
    --chdir=/lustre/your_account/nemotron \
    --container-image="$image" \
    --container-mounts=/lustre/your_account/nemotron:/lustre/your_account/nemotron \
    --container-workdir=/lustre/your_account/nemotron \
    --no-container-mount-home \
    bash
