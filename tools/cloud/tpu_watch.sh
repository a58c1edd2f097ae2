# Sourced by tpu_vm.sh: looks after a run until it has ended, on slices that may be taken away.
# shellcheck shell=bash disable=SC2154  # name, slices, poll, … are those of tpu_vm.sh
#
# Every --poll seconds it looks at the queued resource and, when that is there, at each worker's run:
#   no slice, or it was suspended (preempted) or failed   → make it (again)
#   nothing installed, as on a new slice                  → install, start
#   all workers ended, with 75 or by a restart of a host  → start again: it resumes
#   any worker ended with 2, all with 0                   → end with that code
#   any other code, seen twice                            → end with 1 (once only, it may be a slice about to go)

silent_limit=10  # looks in a row that gcloud or the workers do not answer
failed_limit=5   # requests in a row that failed before the slice was there

# Asked of each worker; on a new one there is nothing of ours yet.
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
            NOT_FOUND) create || note "could not be asked for" ;;
            SUSPENDED) again ;;
            FAILED)
                failed=$((failed + 1))
                [ "$failed" -lt "$failed_limit" ] || finish 1 "the request failed $failed times; see gcloud's describe"
                again
                ;;
            ACTIVE) failed=0 && look ;;
            UNKNOWN) count_silence "gcloud does not answer" ;;
        esac
        sleep "$poll"
    done
}

# The slice is there: what does the run do? Sets silent, restarts, odd and most of watch.
look() {
    local answers count states
    # Of several slices gcloud asks those it reaches, and is content: the answers have to be counted.
    if answers=$(ask_workers) && count=$(wc -w <<<"$answers") && [ "$count" -gt 0 ] && [ "$count" -ge "$most" ]; then
        most=$count
    else
        if lost_nodes; then again; else count_silence "not all workers answer"; fi
        return
    fi
    states=$(sort -u <<<"$answers" | tr '\n' ' ')
    states=${states% }
    note "$count workers: $states"
    case " $states " in
        *' 2 '*)
            if lost_nodes; then again; return; fi # what was wrong was that they did not find each other
            finish 2 "a mistake in the config or the data, or something that could not be fetched or written; see the log"
            ;;
        *' running '*) silent=0 ;; # those that have ended wait for the others
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

# What each worker says, a line a worker.
ask_workers() {
    ssh_to all all "$ask_state" | sed -n 's/^.*sft-jax: state=\([a-z0-9]*\).*$/\1/p'
}

# Whether a node of the slice was taken away, while the queued resource does not say so yet.
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

again() {
    most=0
    { delete && create; } || note "could not be made again; looking again"
}

count_silence() {
    silent=$((silent + 1))
    note "$1 ($silent of $silent_limit)"
    [ "$silent" -lt "$silent_limit" ] || finish 1 "$1; the slice, if it is there, is still paid for"
}

finish() {
    note "$2"
    [ "$1" -eq 0 ] || ssh_to 0 0 'tail -n 20 .sft-jax/train.log' || true
    if [ "$delete_at_end" = yes ]; then delete || note "could not be deleted; it is still paid for"; fi
    exit "$1"
}

note() {
    printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$name" "$*" >&2
}

# A slice that is made again is empty: what is to be resumed must be elsewhere.
check_output_survives() {
    local word where=''
    for word in "${run_args[@]:1}"; do
        case $word in training.output_dir=*) where=${word#*=} ;; esac
    done
    [ -n "$where" ] || where=$(sed -n "s/^ *output_dir: *[\"']\{0,1\}\([^\"' #]*\).*/\1/p" "${run_args[0]}" | head -n 1)
    case $where in
        gs://* | /*) ;;
        *) fail "training.output_dir: '$where' would go with the slice; give training.output_dir=gs://BUCKET/RUN" ;;
    esac
}

# What happens when nothing goes wrong: no slice yet, then one without our files, then a run that has ended.
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
