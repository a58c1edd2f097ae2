#!/usr/bin/env bash
# Trains on the GPUs of this machine.
#
#   local_gpus.sh [--gpus 0,1] [--process-per-gpu] [--port P] [--dry-run] -- CONFIG key=value …
#
#   --gpus LIST         GPUs to use (default: all)
#   --process-per-gpu   one process per GPU with its own log (sft-jax-gpu-I.log; the first is shown); by default one
#                       process uses all GPUs, which needs less host memory
#   --port P            coordinator port (default: 12321)
#   --dry-run           print the commands instead of running them
#
#   local_gpus.sh --gpus 0,1 -- configs/example.yaml data.train.0.path=train.jsonl
#
# Ctrl-C or SIGTERM saves at the next step and exits with code 75; the same command resumes. Exits with the run's code.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tools/cloud/command.sh
. "$here/command.sh"

gpus='' each=no port=12321 run_args=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) print_help && exit ;;
        --) run_args=("${@:2}") && break ;;
        --process-per-gpu) each=yes && shift && continue ;;
        --dry-run) dry_run=yes && shift && continue ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in --gpus | --port) ;; *) fail "$1: no such option; see --help" ;; esac
    [ $# -gt 1 ] || fail "$1: needs a value"
    case $1 in
        --gpus) gpus=$2 ;;
        --port) port=$2 ;;
    esac
    shift 2
done
case $gpus in *[!0-9,]* | ,* | *, | *,,*) fail "--gpus: '$gpus' is not a list such as 0,1" ;; esac
is_count "$port" || fail "--port: '$port' is not a port"
check_run ${run_args[@]+"${run_args[@]}"}
needs sft-jax "activate its environment"

if [ "$each" = yes ]; then
    if [ -z "$gpus" ]; then
        command -v nvidia-smi >/dev/null || fail "--gpus: needs nvidia-smi on the PATH, or a list such as 0,1"
        gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ',' | sed 's/,$//')
        [ -n "$gpus" ] || fail "--gpus: nvidia-smi lists no GPU"
    fi
    IFS=, read -r -a numbers <<<"$gpus"
fi

# Sets the command of process I, or of the only process. It runs without a shell, which would receive its signals.
set_command() {
    if [ "$each" = no ]; then
        command=(env ${gpus:+"CUDA_VISIBLE_DEVICES=$gpus"} sft-jax train "${run_args[@]}" --num-processes 1)
    else
        command=(env "CUDA_VISIBLE_DEVICES=${numbers[$1]}" sft-jax train "${run_args[@]}"
            --coordinator "127.0.0.1:$port" --num-processes "${#numbers[@]}" --process-id "$1")
    fi
}

count=1
[ "$each" = no ] || count=${#numbers[@]}
if [ "$dry_run" = yes ]; then
    for ((i = 0; i < count; i++)); do
        set_command "$i"
        run "${command[@]}"
    done
    exit
fi

# Only this shell receives Ctrl-C. It sends SIGTERM to the processes once: a second one would end them before they save.
children=() caught=no
trap 'caught=yes; trap "" INT TERM; kill -TERM "${children[@]}"' INT TERM
for ((i = 0; i < count; i++)); do
    set_command "$i"
    if [ "$each" = no ]; then
        "${command[@]}" &
    else
        "${command[@]}" >"sft-jax-gpu-$i.log" 2>&1 &
    fi
    children+=($!)
done
[ "$each" = no ] || tail -n +1 -F --pid="${children[0]}" sft-jax-gpu-0.log &

# The processes end together. The exit code is the most informative one: 2 (user error) first, 75 (resume) last.
worst=0
for child in "${children[@]}"; do
    while :; do
        caught=no code=0
        wait "$child" || code=$?
        [ "$caught" = yes ] || break # the signal ended the wait, not the process
    done
    case $worst,$code in
        *,0 | 2,*) ;;
        0,* | 75,* | *,2) worst=$code ;;
    esac
done
wait
exit "$worst"
