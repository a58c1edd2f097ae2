# Sourced by the scripts beside it: commands that are run or, with --dry-run, shown; mistakes told in one line.
# shellcheck shell=bash

dry_run=no

# A mistake of the caller's: one line, exit code 2.
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# One word, such that a shell reads the same word back.
quote() {
    local mark="'" inside="'\\''"
    case $1 in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//$mark/$inside}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# Words as one line of a shell.
line() {
    local first=yes word
    for word in "$@"; do
        [ "$first" = yes ] || printf ' '
        quote "$word"
        first=no
    done
}

run() {
    if [ "$dry_run" = yes ]; then
        line "$@"
        echo
    else
        "$@"
    fi
}

# The header of the calling script, from its second line to the first that is no comment.
print_help() {
    sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
}

needs() {
    [ "$dry_run" = yes ] || command -v "$1" >/dev/null || fail "$1 is not on the PATH; $2"
}

is_count() {
    case $1 in '' | 0* | *[!0-9]*) return 1 ;; *) return 0 ;; esac
}

# The words of a run as they stand after "--": a config file that is here, then key=value.
check_run() {
    local word
    [ $# -gt 0 ] || fail "nothing to train; end with -- CONFIG.yaml key=value …"
    [ -f "$1" ] || fail "$1: no such config file"
    for word in "${@:2}"; do
        case $word in
            [A-Za-z]*=*) ;;
            *) fail "$word: is not key=value" ;;
        esac
    done
}
