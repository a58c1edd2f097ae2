#!/usr/bin/env bash
#SBATCH --job-name=sft-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
#
# Trains on the GPUs of a SLURM cluster: submits itself as a job, which runs sft-jax.
#
#   slurm.sh [--dry-run] [sbatch options] -- CONFIG key=value …
#
#   slurm.sh --gpus-per-node=8 --cpus-per-task=32 --time=4:00:00 -- my.yaml training.output_dir=/shared/mine
#   slurm.sh --nodes=4 --gpus-per-node=8 --exclusive -- my.yaml training.output_dir=/shared/mine
#   slurm.sh --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 -- my.yaml training.output_dir=/shared/mine
#
# One process uses all GPUs of its node; with --ntasks-per-node equal to --gpus-per-node there is one process per GPU.
# sft-jax must be on the PATH, and its environment and the output directory on a file system that the nodes share.
# On preemption, and 5 minutes before the --time limit, the run saves and exits with code 75, and the job is requeued,
# at most SFT_JAX_MAX_RESTARTS times (default: 100). It is not requeued after a user error (2), a failure or scancel.
set -euo pipefail

fail() {
    printf 'slurm.sh: %s\n' "$*" >&2
    exit 2
}

# Submits the job. SLURM copies this file, so only this function can find the other scripts.
submit() {
    local here flags=()
    here=$(cd "$(dirname "$0")" && pwd)
    # shellcheck source=tools/cloud/command.sh
    . "$here/command.sh"
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) print_help | grep -v '^SBATCH' && exit ;;
            --dry-run) dry_run=yes ;;
            --) shift && break ;;
            -*) flags+=("$1") ;;
            *) fail "$1: write sbatch options as --name=value, and -- before the config" ;;
        esac
        shift
    done
    check_run "$@"
    needs sbatch "run this on a SLURM cluster"
    needs sft-jax "activate its environment"
    run sbatch ${flags[@]+"${flags[@]}"} "$here/slurm.sh" run "$@"
}

# Runs in the job on the first node.
train() {
    local tasks=${SLURM_NTASKS:-1} nodes=${SLURM_JOB_NUM_NODES:-1} code=0 hosts port
    local srun=(srun --kill-on-bad-exit=0) # sft-jax stops the other processes after they have saved
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    trap : TERM # meant for the processes; this shell must live to read their exit code
    if [ "$tasks" -eq 1 ]; then
        "${srun[@]}" sft-jax train "$@" --num-processes 1 || code=$?
    elif [ "$tasks" -eq "$nodes" ]; then
        # JAX's own cluster detection would assume one process per GPU and use one GPU.
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        port=$((61440 + SLURM_JOB_ID % 4096))
        # shellcheck disable=SC2016  # SLURM_PROCID is set in each process
        "${srun[@]}" bash -c 'exec sft-jax train "$@" --process-id "$SLURM_PROCID"' sft-jax "$@" \
            --coordinator "${hosts%%$'\n'*}:$port" --num-processes "$tasks" || code=$?
    else
        "${srun[@]}" sft-jax train "$@" || code=$?
    fi
    [ "$code" -ne 75 ] || requeue
    exit "$code"
}

requeue() {
    local state
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${SFT_JAX_MAX_RESTARTS:-100}" ]; then
        echo "slurm.sh: not requeued after $SLURM_RESTART_COUNT restarts" >&2
        return
    fi
    state=$(squeue --noheader "--jobs=$SLURM_JOB_ID" --format=%T)
    if [ "$state" != RUNNING ]; then # scancel
        echo "slurm.sh: the job is $state and not requeued" >&2
        return
    fi
    scontrol requeue "$SLURM_JOB_ID"
}

if [ "${1:-}" = run ]; then
    [ -n "${SLURM_JOB_ID:-}" ] || fail "run: only for SLURM; see --help"
    train "${@:2}"
fi
submit "$@"
