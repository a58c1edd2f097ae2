#!/usr/bin/env bash
# Installs sft-jax on a host of a slice and runs it in the background. tpu_vm.sh copies the source tree to
# ~/.sft-jax/source and calls this script there.
#
#   worker.sh install            install Python 3.12, sft-jax and jax for TPU in ~/.sft-jax/venv with uv
#   worker.sh start key=value …  run sft-jax train ~/.sft-jax/config.yaml key=value …, with variables of ~/.sft-jax/env
#   worker.sh state              print running, an exit code, gone (no exit code: the host was restarted), or none
#   worker.sh stop               send SIGTERM: the run saves at the next step and exits with code 75
#   worker.sh logs [LINES]       follow the log
set -euo pipefail

home=$HOME/.sft-jax
boot=$(cat /proc/sys/kernel/random/boot_id)
mkdir -p "$home"

install() {
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    # Cloud TPU images have Python 3.10, which is too old.
    uv venv --quiet --allow-existing --python 3.12 "$home/venv"
    uv pip install --quiet --python "$home/venv/bin/python" "sft-jax[tpu] @ file://$home/source" gcsfs
    "$home/venv/bin/sft-jax" --version
}

state() {
    local pid born
    if [ -e "$home/exit_code" ]; then
        cat "$home/exit_code"
    elif [ -e "$home/pid" ]; then
        read -r pid born <"$home/pid"
        if [ "$born" = "$boot" ] && kill -0 "$pid" 2>/dev/null; then echo running; else echo gone; fi
    else
        echo none
    fi
}

start() {
    if [ "$(state)" = running ]; then
        echo "worker.sh: a run is in progress; stop it first" >&2
        exit 2
    fi
    if [ -e "$home/env" ]; then
        chmod 600 "$home/env"
        bash -euc '. "$1"' env "$home/env" # prints an error in it here instead of in the log
    fi
    rm -f "$home/exit_code" "$home/child"
    nohup setsid bash "$0" supervise "$@" >/dev/null 2>&1 </dev/null &
    echo "$! $boot" >"$home/pid"
}

# Runs the training and writes its exit code to a file. At shutdown the host sends SIGTERM to this shell too, which
# ignores it.
supervise() {
    local caught code
    cd "$HOME"
    if [ -e "$home/env" ]; then
        set -a
        # shellcheck source=/dev/null
        . "$home/env"
        set +a
    fi
    trap 'caught=yes' TERM
    PYTHONUNBUFFERED=1 "$home/venv/bin/sft-jax" train "$home/config.yaml" "$@" >>"$home/train.log" 2>&1 &
    echo $! >"$home/child"
    while :; do
        caught=no code=0
        wait $! || code=$?
        [ "$caught" = yes ] || break
    done
    echo "$code" >"$home/exit_code.new"
    mv "$home/exit_code.new" "$home/exit_code"
}

case ${1:-} in
    install) install ;;
    start) start "${@:2}" ;;
    supervise) supervise "${@:2}" ;;
    state) echo "sft-jax: state=$(state) $(hostname)" ;;
    stop) if [ "$(state)" = running ]; then kill -TERM "$(cat "$home/child")"; fi ;;
    logs) tail -n "${2:-100}" -F "$home/train.log" ;;
    *) sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
