#!/usr/bin/env bash
#SBATCH --job-name=sft-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
#
# sft-jax on the GPUs of a SLURM cluster. Run by you it submits itself; run by SLURM it trains.
#
#   slurm.sh [--dry-run] [options of sbatch] -- CONFIG key=value …
#
#   slurm.sh --gpus-per-node=8 --cpus-per-task=32 --time=4:00:00 -- my.yaml training.output_dir=/shared/mine
#   slurm.sh --nodes=4 --gpus-per-node=8 --exclusive -- my.yaml training.output_dir=/shared/mine
#   slurm.sh --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 -- my.yaml training.output_dir=/shared/mine
#
# One process drives all GPUs of its node; with --ntasks-per-node as large as --gpus-per-node there is one for each GPU.
# sft-jax must be on the PATH where this is called, in an environment that the nodes see too, and so must the output.
# Preempted, or 5 minutes before --time is over, the run saves, ends with code 75, and the job goes back into the queue;
# a mistake (2) or a fault does not. SFT_JAX_MAX_RESTARTS (default 100) bounds how often. scancel ends the job for good.
set -euo pipefail

fail() {
    printf 'slurm.sh: %s\n' "$*" >&2
    exit 2
}

# What submits: SLURM copies this file elsewhere, so only here it can know what is beside it.
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
            *) fail "$1: options of sbatch are written --name=value here, and -- comes before the config" ;;
        esac
        shift
    done
    check_run "$@"
    needs sbatch "this is no SLURM cluster"
    needs sft-jax "activate the environment it is installed in"
    run sbatch ${flags[@]+"${flags[@]}"} "$here/slurm.sh" run "$@"
}

# What SLURM runs, on the first node.
train() {
    local tasks=${SLURM_NTASKS:-1} nodes=${SLURM_JOB_NUM_NODES:-1} code=0 hosts port
    local srun=(srun --kill-on-bad-exit=0) # a process that fails ends the others itself, after they have saved
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    trap : TERM # meant for the processes; this shell still has to read their exit code
    if [ "$tasks" -eq 1 ]; then
        "${srun[@]}" sft-jax train "$@" --num-processes 1 || code=$?
    elif [ "$tasks" -eq "$nodes" ]; then
        # jax, left to find the others itself, would take the process for one of several on its node, and use one GPU.
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        port=$((61440 + SLURM_JOB_ID % 4096))
        # shellcheck disable=SC2016  # SLURM_PROCID is that of each process
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
        echo "slurm.sh: restarted $SLURM_RESTART_COUNT times; no more" >&2
        return
    fi
    state=$(squeue --noheader "--jobs=$SLURM_JOB_ID" --format=%T)
    if [ "$state" != RUNNING ]; then # scancel
        echo "slurm.sh: the job is $state and not put back into the queue" >&2
        return
    fi
    scontrol requeue "$SLURM_JOB_ID"
}

if [ "${1:-}" = run ]; then
    [ -n "${SLURM_JOB_ID:-}" ] || fail "run: is for SLURM to call; see --help"
    train "${@:2}"
fi
submit "$@"
