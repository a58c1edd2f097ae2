#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or on several slices as one run (multislice), with queued resources.
#
#   tpu_vm.sh create  NAME [options]                      request the slice
#   tpu_vm.sh wait    NAME [options]                      wait until it is active
#   tpu_vm.sh install NAME [options]                      install this source tree, Python and jax on all workers
#   tpu_vm.sh train   NAME [options] -- CONFIG key=value  start or resume the run on all workers, and return
#   tpu_vm.sh logs    NAME [options]                      follow the log of one worker
#   tpu_vm.sh status  NAME [options]                      print the state of the slice and of each worker
#   tpu_vm.sh stop    NAME [options]                      save at the next step and stop (exit code 75)
#   tpu_vm.sh watch   NAME [options] -- CONFIG key=value  do all of this until the run ends: create the slice, recreate
#                                                         it after preemption, and resume
#   tpu_vm.sh delete  NAME [options]                      delete the slice
#
#   --project P, --zone Z         default: gcloud's settings
#   --accelerator-type T          v5litepod-16, v5p-32, v6e-64, … (create, watch)
#   --runtime-version V           default: the one for JAX on this type (also --version)
#   --slices N                    number of slices of the run, connected by the data center network
#   --spot                        cheaper, but may be preempted
#   --valid-until-duration D      cancel the request after this time, such as 6h
#   --create-arg A, --ssh-arg A   an extra gcloud flag, such as --create-arg --reserved; may be repeated
#   --env-file F                  lines NAME=value for the run, such as HF_TOKEN; copied, never printed
#   --source DIR                  the source tree to install; default: the one of this script
#   --node N, --worker N          the worker whose log to follow (default: 0 and 0)
#   --poll SECONDS                polling interval (default: 60)
#   --max-restarts N              maximum number of restarts by watch (default: 100)
#   --delete-at-end               watch deletes the slice after the run, also after an error
#   --dry-run                     print the commands instead of running them
#
#   tpu_vm.sh watch mine --accelerator-type v5litepod-16 --zone us-west4-a --spot --delete-at-end \
#       -- my.yaml training.output_dir=gs://BUCKET/mine data.train.0.path=gs://BUCKET/train.jsonl
#
# Exit code of watch: the run's code if it is 0 or 2; 75 after --max-restarts; 1 otherwise.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tools/cloud/command.sh
. "$here/command.sh"
# shellcheck source=tools/cloud/tpu_watch.sh
. "$here/tpu_watch.sh"

project='' zone='' accelerator_type='' runtime='' slices=1 spot=no valid_until='' env_file=''
source=$(cd "$here/../.." && pwd)
node=0 worker=0 poll=60 max_restarts=100 delete_at_end=no
create_args=() ssh_args=() run_args=()

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --) run_args=("${@:2}") && return ;;
            --spot) spot=yes && shift && continue ;;
            --delete-at-end) delete_at_end=yes && shift && continue ;;
            --dry-run) dry_run=yes && shift && continue ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case $1 in
            --project | --zone | --accelerator-type | --runtime-version | --version | --slices | --env-file) ;;
            --source | --valid-until-duration | --create-arg | --ssh-arg | --node | --worker | --poll) ;;
            --max-restarts) ;;
            *) fail "$1: no such option; see --help" ;;
        esac
        [ $# -gt 1 ] || fail "$1: needs a value"
        case $1 in
            --project) project=$2 ;;
            --zone) zone=$2 ;;
            --accelerator-type) accelerator_type=$2 ;;
            --runtime-version | --version) runtime=$2 ;;
            --slices) slices=$2 ;;
            --valid-until-duration) valid_until=$2 ;;
            --create-arg) create_args+=("$2") ;;
            --ssh-arg) ssh_args+=("$2") ;;
            --env-file) env_file=$2 ;;
            --source) source=$2 ;;
            --node) node=$2 ;;
            --worker) worker=$2 ;;
            --poll) poll=$2 ;;
            --max-restarts) max_restarts=$2 ;;
        esac
        shift 2
    done
}

check() {
    case $name in
        '' | [!a-z]* | *[!a-z0-9-]* | *-) fail "'$name': a slice name has a-z, 0-9 and -, and starts with a letter" ;;
    esac
    is_count "$slices" || fail "--slices: '$slices' is not a number of slices"
    case $poll in '' | *[!0-9]*) fail "--poll: '$poll' is not a number of seconds" ;; esac
    is_count "$max_restarts" || fail "--max-restarts: '$max_restarts' is not a number of restarts"
    [ -z "$env_file" ] || [ -f "$env_file" ] || fail "--env-file: no such file $env_file"
    [ -f "$source/pyproject.toml" ] || fail "--source: $source is not a source tree of sft-jax"
    case $verb in
        create | watch)
            [ -n "$accelerator_type" ] || fail "--accelerator-type: is missing; such as v5litepod-16"
            [ -n "$runtime" ] || runtime=$(runtime_of "$accelerator_type")
            [ -n "$runtime" ] || fail "--runtime-version: is missing; no default for $accelerator_type"
            ;;
    esac
    case $verb in
        train | watch) check_run ${run_args[@]+"${run_args[@]}"} ;;
        *) [ ${#run_args[@]} -eq 0 ] || fail "${run_args[0]}: $verb takes no config" ;;
    esac
    needs gcloud "install the Google Cloud CLI"
}

# The recommended runtime version for JAX (cloud.google.com/tpu/docs/runtimes).
runtime_of() {
    case $1 in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    esac
}

# gcloud compute tpus GROUP COMMAND NAME flags, in the project and zone.
tpus() {
    local location=()
    [ -z "$project" ] || location+=("--project=$project")
    [ -z "$zone" ] || location+=("--zone=$zone")
    run gcloud compute tpus "$@" ${location[@]+"${location[@]}"}
}

create() {
    local flags=("--accelerator-type=$accelerator_type" "--runtime-version=$runtime")
    if [ "$slices" -eq 1 ]; then
        flags+=("--node-id=$name")
    else
        flags+=("--node-count=$slices" "--node-prefix=$name")
    fi
    [ "$spot" = no ] || flags+=(--spot)
    [ -z "$valid_until" ] || flags+=("--valid-until-duration=$valid_until")
    tpus queued-resources create "$name" "${flags[@]}" ${create_args[@]+"${create_args[@]}"}
}

delete() {
    tpus queued-resources delete "$name" --force --quiet
}

# Runs a shell command on workers: NODE WORKER COMMAND.
ssh_to() {
    tpus queued-resources ssh "$name" "--node=$1" "--worker=$2" --quiet "--command=$3" ${ssh_args[@]+"${ssh_args[@]}"}
}

copy() {
    tpus queued-resources scp "$1" "$name:$2" --node=all --worker=all --quiet ${ssh_args[@]+"${ssh_args[@]}"}
}

on_worker='bash .sft-jax/source/tools/cloud/worker.sh'

install() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/sft-jax
    local archive=$cache/$name.tar.gz
    local unpack='rm -rf .sft-jax/source && mkdir -p .sft-jax/source && tar -xzf sft-jax.tar.gz -C .sft-jax/source'
    run mkdir -p "$cache" &&
        run tar -czf "$archive" --exclude=__pycache__ -C "$source" pyproject.toml README.md LICENSE sft_jax tools &&
        copy "$archive" sft-jax.tar.gz &&
        ssh_to all all "$unpack && $on_worker install"
}

start() {
    local words=''
    [ ${#run_args[@]} -eq 1 ] || words=" $(line "${run_args[@]:1}")"
    copy "${run_args[0]}" .sft-jax/config.yaml &&
        { [ -z "$env_file" ] || copy "$env_file" .sft-jax/env; } &&
        ssh_to all all "$on_worker start$words"
}

# State of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, …; NOT_FOUND; UNKNOWN if gcloud failed.
queue_state() {
    local errors state
    errors=$(mktemp)
    if state=$(tpus queued-resources describe "$name" '--format=value(state.state)' 2>"$errors"); then
        echo "$state"
    elif grep -q NOT_FOUND "$errors"; then
        echo NOT_FOUND
    else
        cat "$errors" >&2
        echo UNKNOWN
    fi
    rm -f "$errors"
}

await() {
    local state
    if [ "$dry_run" = yes ]; then
        queue_state
        return
    fi
    while :; do
        state=$(queue_state)
        echo "$name: $state"
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDED | NOT_FOUND) return 1 ;;
        esac
        sleep "$poll"
    done
}

case ${1:-} in
    '' | -h | --help | help) print_help && exit ;;
    create | wait | install | train | logs | status | stop | watch | delete) ;;
    *) fail "$1: no such verb; see --help" ;;
esac
case ${2:-} in -h | --help) print_help && exit ;; esac
verb=$1 name=${2:-}
[ $# -gt 1 ] || fail "$verb: the name of the slice is missing"
parse "${@:3}"
check

case $verb in
    create | install | delete) "$verb" ;;
    wait) await ;;
    train) start ;;
    logs) ssh_to "$node" "$worker" "$on_worker logs" ;;
    status)
        tpus queued-resources describe "$name" '--format=value(state.state)'
        ssh_to all all "$ask_state"
        ;;
    stop) ssh_to all all "$on_worker stop" ;;
    watch) watch ;;
esac
