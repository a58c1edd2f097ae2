#!/usr/bin/env bash
# Trains on GKE as a JobSet on existing TPU or GPU node pools. No image to build: the standard python image installs the
# package when a pod starts.
#
#   gke.sh render NAME --topology v5e:4x4 [options] -- CONFIG key=value …   print the manifest
#   gke.sh train  NAME --topology h100:8  [options] -- CONFIG key=value …   kubectl apply it
#   gke.sh xpk    NAME --topology v5e:4x4 [options] -- CONFIG key=value …   the same with xpk (TPU; needs --cluster)
#   gke.sh status NAME      gke.sh logs NAME      gke.sh delete NAME
#
#   --package P            what pip installs: a wheel at gs://… or https://…, or git+https://…
#   --topology T           GKE's names: v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:8x8 for a slice; l4:1, a100:8, a100-80gb:8
#                          (a100-40g and a100-80g of sft-jax plan), h100:8, h100-mega:8, h200:8, b200:8 for a node
#   --slices N, --nodes N  number of slices or nodes of the run (default: 1)
#   --chips-per-host N     for TPU topologies that exist with 8 and with 4 chips per host (2x4 of v5e and v6e)
#   --spot                 only on spot nodes
#   --cuda 12|13           CUDA version that the driver of the GPU nodes supports (default: 13)
#   --service-account S    Kubernetes service account with access to the bucket (default: default)
#   --image I              container image (default: python:3.12)
#   --max-restarts N       maximum number of restarts, such as after preemption; never after a user error (default: 100)
#   --cluster C, --project P, --zone Z    for xpk
#   --dry-run              print the commands instead of running them
#
#   gke.sh train mine --topology v5e:4x4 --package gs://BUCKET/sft_jax-0.1.0-py3-none-any.whl \
#       -- my.yaml training.output_dir=gs://BUCKET/mine data.train.0.path=gs://BUCKET/train.jsonl
#
# If there is a Secret hf-token with the key token, the run gets it as HF_TOKEN.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tools/cloud/command.sh
. "$here/command.sh"

package='' topology='' slices=1 nodes=1 chips_per_host='' spot=no cuda=13 service_account=default image=python:3.12
max_restarts=100 cluster='' project='' zone='' run_args=()
kind='' accelerator='' shape='' chips='' hosts='' xpk_type='' # set by read_topology

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --) run_args=("${@:2}") && return ;;
            --spot) spot=yes && shift && continue ;;
            --dry-run) dry_run=yes && shift && continue ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case $1 in
            --package | --topology | --slices | --nodes | --chips-per-host | --cuda | --service-account | --image) ;;
            --max-restarts | --cluster | --project | --zone) ;;
            *) fail "$1: no such option; see --help" ;;
        esac
        [ $# -gt 1 ] || fail "$1: needs a value"
        case $1 in
            --package) package=$2 ;;
            --topology) topology=$2 ;;
            --slices) slices=$2 ;;
            --nodes) nodes=$2 ;;
            --chips-per-host) chips_per_host=$2 ;;
            --cuda) cuda=$2 ;;
            --service-account) service_account=$2 ;;
            --image) image=$2 ;;
            --max-restarts) max_restarts=$2 ;;
            --cluster) cluster=$2 ;;
            --project) project=$2 ;;
            --zone) zone=$2 ;;
        esac
        shift 2
    done
}

check() {
    case $name in
        '' | [!a-z]* | *[!a-z0-9-]* | *-) fail "'$name': a JobSet name has a-z, 0-9 and -, and starts with a letter" ;;
    esac
    case $verb in
        render | train | xpk) ;;
        *) [ ${#run_args[@]} -eq 0 ] || fail "${run_args[0]}: $verb takes no config"; return 0 ;;
    esac
    is_count "$slices" || fail "--slices: '$slices' is not a number of slices"
    is_count "$nodes" || fail "--nodes: '$nodes' is not a number of nodes"
    is_count "$max_restarts" || fail "--max-restarts: '$max_restarts' is not a number of restarts"
    case $cuda in 12 | 13) ;; *) fail "--cuda: '$cuda' is not 12 or 13" ;; esac
    [ -n "$package" ] || fail "--package: is missing; such as gs://BUCKET/sft_jax-0.1.0-py3-none-any.whl"
    case $package in -* | *[[:space:]]*) fail "--package: '$package' is not a package for pip" ;; esac
    case $image$service_account in *[!A-Za-z0-9._/:@-]*) fail "--image, --service-account: not a valid name" ;; esac
    read_topology
    check_run ${run_args[@]+"${run_args[@]}"}
}

# Sets kind, node label, shape, hosts per slice and chips per host (TPU), or nodes and GPUs per node (GPU).
read_topology() {
    local type=${topology%%:*} side total=1 default=4
    shape=${topology#*:}
    case $type in
        v4) kind=tpu accelerator=tpu-v4-podslice xpk_type=v4 ;;
        v5e) kind=tpu accelerator=tpu-v5-lite-podslice xpk_type=v5litepod ;;
        v5p) kind=tpu accelerator=tpu-v5p-slice xpk_type=v5p ;;
        v6e) kind=tpu accelerator=tpu-v6e-slice xpk_type=v6e ;;
        l4) kind=gpu accelerator=nvidia-l4 ;;
        a100) kind=gpu accelerator=nvidia-tesla-a100 ;;
        a100-80gb) kind=gpu accelerator=nvidia-a100-80gb ;;
        h100) kind=gpu accelerator=nvidia-h100-80gb ;;
        h100-mega) kind=gpu accelerator=nvidia-h100-mega-80gb ;;
        h200) kind=gpu accelerator=nvidia-h200-141gb ;;
        b200) kind=gpu accelerator=nvidia-b200 ;;
        *) fail "--topology: '$topology' is not known; such as v5e:4x4 or h100:8" ;;
    esac
    if [ "$kind" = gpu ]; then
        is_count "$shape" || fail "--topology: '$topology' is not TYPE:GPUS, such as h100:8"
        [ "$slices" -eq 1 ] || fail "--slices: is for TPUs; GPUs have --nodes"
        chips=$shape hosts=$nodes
        return
    fi
    [ "$nodes" -eq 1 ] || fail "--nodes: is for GPUs; the topology of a slice sets its hosts"
    for side in ${shape//x/ }; do
        is_count "$side" || fail "--topology: '$topology' is not TYPE:AxB or TYPE:AxBxC"
        total=$((total * side))
    done
    case $type,$shape in
        v5e,2x4 | v6e,2x4) default=8 ;; # one host of the larger of the two machine types
        v5e,*x*x* | v6e,*x*x*) fail "--topology: '$topology': slices of $type are AxB" ;;
        v4,*x*x* | v5p,*x*x* | v5e,*x* | v6e,*x*) ;;
        *) fail "--topology: '$topology': slices of $type are AxB (v5e, v6e) or AxBxC (v4, v5p)" ;;
    esac
    chips=${chips_per_host:-$default}
    is_count "$chips" || fail "--chips-per-host: '$chips' is not a number of chips"
    [ -n "$chips_per_host" ] || [ "$total" -ge "$chips" ] || chips=$total
    [ $((total % chips)) -eq 0 ] || fail "--chips-per-host: $chips does not divide the $total chips of $topology"
    hosts=$((total / chips))
    case $type in v4 | v5p) xpk_type=$xpk_type-$((total * 2)) ;; *) xpk_type=$xpk_type-$total ;; esac # cores, chips
}

# Prints the commands of a pod before its run.
setup() {
    local extra=tpu fetch
    [ "$kind" = tpu ] || extra=cuda$cuda
    case $package in
        gs://*)
            echo "pip install --quiet gcsfs"
            echo "mkdir -p /tmp/wheel"
            fetch='import sys, fsspec; fsspec.filesystem("gs").get(sys.argv[1], "/tmp/wheel/")'
            line python -c "$fetch" "$package"
            echo
            echo "pip install --quiet $(quote "sft-jax[$extra] @ file:///tmp/wheel/${package##*/}")"
            ;;
        *) echo "pip install --quiet gcsfs $(quote "sft-jax[$extra] @ $package")" ;;
    esac
}

# Prints the shell script of a pod; it ends with exec, so that the run receives SIGTERM.
script() {
    local processes=''
    if [ "$kind" = gpu ] && [ "$hosts" -eq 1 ]; then
        processes=' --num-processes 1'
    elif [ "$kind" = gpu ]; then
        processes=" --coordinator $name-node-0-0.$name:12321 --num-processes $hosts"
        processes+=" --process-id \"\$JOB_COMPLETION_INDEX\""
    fi
    setup
    echo "exec sft-jax train /config/config.yaml \"\$@\"$processes"
}

# Formats a text as a JSON string, which is valid YAML.
json() {
    local text=$1
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\t'/\\t}
    text=${text//$'\n'/\\n}
    printf '"%s"' "$text"
}

render() {
    local manifest config args='' word spot_line='' newline=$'\n'
    manifest=$(cat "$here/gke_$kind.yaml")
    config=$(sed 's/^/    /' "${run_args[0]}")
    for word in "${run_args[@]:1}"; do args+="${args:+, }$(json "$word")"; done
    [ "$spot" = no ] || spot_line='                cloud.google.com/gke-spot: "true"'
    manifest=${manifest//@NAME@/"$name"}
    manifest=${manifest//@MAX_RESTARTS@/"$max_restarts"}
    manifest=${manifest//@SLICES@/"$slices"}
    manifest=${manifest//@HOSTS@/"$hosts"}
    manifest=${manifest//@CHIPS@/"$chips"}
    manifest=${manifest//@ACCELERATOR@/"$accelerator"}
    manifest=${manifest//@TOPOLOGY@/"$shape"}
    manifest=${manifest//@SERVICE_ACCOUNT@/"$service_account"}
    manifest=${manifest//@IMAGE@/"$image"}
    manifest=${manifest//@SPOT@$newline/"${spot_line:+$spot_line$newline}"}
    manifest=${manifest//@SCRIPT@/"$(json "$(script)")"}
    manifest=${manifest//@ARGS@/"$args"}
    manifest=${manifest//@CONFIG@/"$config"} # last: it may contain other placeholders
    printf '%s\n' "$manifest"
}

train() {
    local manifest
    manifest=$(render)
    needs kubectl "install it and run gcloud container clusters get-credentials CLUSTER"
    if [ "$dry_run" = yes ]; then
        printf "kubectl apply -f - <<'END_OF_MANIFEST'\n%s\nEND_OF_MANIFEST\n" "$manifest"
    else
        printf '%s\n' "$manifest" | kubectl apply -f -
    fi
}

# xpk cannot mount a config, so the command contains it.
xpk_create() {
    local command step flags=("--tpu-type=$xpk_type" "--num-slices=$slices")
    [ "$kind" = tpu ] || fail "xpk: TPUs only; use gke.sh train for GPUs"
    [ -n "$cluster" ] || fail "--cluster: is missing"
    needs xpk "pip install xpk"
    [ -z "$project" ] || flags+=("--project=$project")
    [ -z "$zone" ] || flags+=("--zone=$zone")
    command="set -eu; mkdir -p /config; echo $(base64 <"${run_args[0]}" | tr -d '\n') | base64 -d > /config/config.yaml"
    while IFS= read -r step; do command+="; $step"; done < <(setup)
    command+="; exec sft-jax train $(line /config/config.yaml "${run_args[@]:1}")"
    run xpk workload create "--workload=$name" "--cluster=$cluster" "${flags[@]}" "--docker-image=$image" \
        "--max-restarts=$max_restarts" --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
        "--command=$command"
}

run_kubectl() {
    needs kubectl "install it and run gcloud container clusters get-credentials CLUSTER"
    run kubectl "$@"
}

case ${1:-} in
    '' | -h | --help | help) print_help && exit ;;
    render | train | xpk | status | logs | delete) ;;
    *) fail "$1: no such verb; see --help" ;;
esac
case ${2:-} in -h | --help) print_help && exit ;; esac
verb=$1 name=${2:-}
[ $# -gt 1 ] || fail "$verb: the name of the JobSet is missing"
parse "${@:3}"
check

pods="jobset.sigs.k8s.io/jobset-name=$name"
first="$pods,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
case $verb in
    render | train) "$verb" ;;
    xpk) xpk_create ;;
    status)
        run_kubectl get jobset "$name"
        run_kubectl get pods -l "$pods" --output=wide
        ;;
    logs) run_kubectl logs -f -l "$first" --tail=200 ;;
    delete) run_kubectl delete "jobset/$name" "configmap/$name" --ignore-not-found ;;
esac
