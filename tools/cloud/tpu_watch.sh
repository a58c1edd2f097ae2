# Sourced by tpu_vm.sh: supervises a run until it ends, on slices that may be preempted.
# shellcheck shell=bash disable=SC2154  # name, slices, poll, … are those of tpu_vm.sh
#
# Every --poll seconds it checks the queued resource and, if that is active, the run on each worker:
#   no slice, or suspended (preempted), or failed        → create or recreate it
#   nothing installed, as on a new slice                 → install, start
#   all workers exited with 75, or a host was restarted  → start again, which resumes
#   any worker exited with 2, or all with 0              → exit with this code
#   any other code, twice in a row                       → exit with 1 (the first time, preemption may be the cause)

silent_limit=10  # polls in a row without an answer from gcloud or the workers
failed_limit=5   # requests in a row that failed

# The command that asks a worker for its state; a new worker has nothing installed.
ask_state='[ -e .sft-jax/venv/bin/sft-jax ] && bash .sft-jax/source/tools/cloud/worker.sh state'
ask_state+=' || echo sft-jax: state=absent'

watch() {
    local failed=0 silent=0 restarts=0 odd=no most=0 state
    check_output_survives
    if [ "$dry_run" = yes ]; then
        show_watch
        return
    fi
    while :; do
        state=$(queue_state)
        note "$state"
        case $state in
            NOT_FOUND) create || note "could not be requested" ;;
            SUSPENDED) recreate ;;
            FAILED)
                failed=$((failed + 1))
                [ "$failed" -lt "$failed_limit" ] || finish 1 "the request failed $failed times; see gcloud describe"
                recreate
                ;;
            ACTIVE) failed=0 && check_workers ;;
            UNKNOWN) count_silence "gcloud does not answer" ;;
        esac
        sleep "$poll"
    done
}

# Checks the run on an active slice. Sets silent, restarts, odd and most of watch.
check_workers() {
    local answers count states
    # With several slices gcloud succeeds if it reaches some of them, so the answers are counted.
    if answers=$(ask_workers) && count=$(wc -w <<<"$answers") && [ "$count" -gt 0 ] && [ "$count" -ge "$most" ]; then
        most=$count
    else
        if lost_nodes; then recreate; else count_silence "not all workers answer"; fi
        return
    fi
    states=$(sort -u <<<"$answers" | tr '\n' ' ')
    states=${states% }
    note "$count workers: $states"
    case " $states " in
        *' 2 '*)
            if lost_nodes; then recreate; return; fi # the error was that the processes did not find each other
            finish 2 "user error in the config or data, or a failed download or write; see the log"
            ;;
        *' running '*) silent=0 ;; # wait until all workers have ended
        ' 0 ') finish 0 "done" ;;
        *' absent '*) { install && started; } || count_silence "could not be installed or started" ;;
        *)
            if grep -qvxE '0|75|gone|none' <<<"$answers"; then
                [ "$odd" = no ] || finish 1 "the run failed"
                odd=yes
                return
            fi
            restarts=$((restarts + 1))
            [ "$restarts" -le "$max_restarts" ] || finish 75 "restarted $max_restarts times"
            started || count_silence "could not be started"
            ;;
    esac
    odd=no
}

started() {
    start && silent=0
}

# Prints the state of each worker, one per line.
ask_workers() {
    ssh_to all all "$ask_state" | sed -n 's/^.*sft-jax: state=\([a-z0-9]*\).*$/\1/p'
}

# Whether a node of the slice is gone, which the queued resource may report later.
lost_nodes() {
    local i node_name
    for ((i = 0; i < slices; i++)); do
        node_name=$name
        [ "$slices" -eq 1 ] || node_name=$name-$i
        case $(tpus tpu-vm describe "$node_name" '--format=value(state)' 2>/dev/null) in
            PREEMPTED | TERMINATED | STOPPED | STOPPING) return 0 ;;
        esac
    done
    return 1
}

recreate() {
    most=0
    { delete && create; } || note "could not be recreated; retrying"
}

count_silence() {
    silent=$((silent + 1))
    note "$1 ($silent of $silent_limit)"
    [ "$silent" -lt "$silent_limit" ] || finish 1 "$1; the slice may still exist and cost money"
}

finish() {
    note "$2"
    [ "$1" -eq 0 ] || ssh_to 0 0 'tail -n 20 .sft-jax/train.log' || true
    if [ "$delete_at_end" = yes ]; then delete || note "could not be deleted and still costs money"; fi
    exit "$1"
}

note() {
    printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$name" "$*" >&2
}

# The output directory must survive the slice: a recreated slice is empty.
check_output_survives() {
    local word dir=''
    for word in "${run_args[@]:1}"; do
        case $word in training.output_dir=*) dir=${word#*=} ;; esac
    done
    [ -n "$dir" ] || dir=$(sed -n "s/^ *output_dir: *[\"']\{0,1\}\([^\"' #]*\).*/\1/p" "${run_args[0]}" | head -n 1)
    case $dir in
        gs://* | /*) ;;
        *) fail "training.output_dir: '$dir' would be lost with the slice; use training.output_dir=gs://BUCKET/RUN" ;;
    esac
}

# The commands of a run without errors: no slice yet, then a new slice, then a run that has ended.
show_watch() {
    queue_state
    create
    queue_state
    ssh_to all all "$ask_state"
    install
    start
    queue_state
    ssh_to all all "$ask_state"
    if [ "$delete_at_end" = yes ]; then delete; fi
}
