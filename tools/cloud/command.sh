# Sourced by the other scripts: runs commands or, with --dry-run, prints them; prints user errors in one line.
# shellcheck shell=bash

dry_run=no

# A user error: one line, exit code 2.
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# Quotes a word for the shell.
quote() {
    local mark="'" inside="'\\''"
    case $1 in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//$mark/$inside}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# Joins words into a line of shell code.
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

# Prints the header of the calling script: from its second line to the last line of the comment.
print_help() {
    sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
}

needs() {
    [ "$dry_run" = yes ] || command -v "$1" >/dev/null || fail "$1 is not on the PATH; $2"
}

is_count() {
    case $1 in '' | 0* | *[!0-9]*) return 1 ;; *) return 0 ;; esac
}

# Checks the words after "--": an existing config file, then key=value.
check_run() {
    local word
    [ $# -gt 0 ] || fail "no config; end the command with -- CONFIG.yaml key=value …"
    [ -f "$1" ] || fail "$1: no such config file"
    for word in "${@:2}"; do
        case $word in
            [A-Za-z]*=*) ;;
            *) fail "$word: not of the form key=value" ;;
        esac
    done
}
