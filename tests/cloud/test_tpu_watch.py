"""tools/cloud against stubs: ``tpu_vm.sh watch`` and the script that runs on each worker."""

import re
import signal
import subprocess
import time

import pytest
from stubs import Stubs

TPU = ["--accelerator-type", "v5litepod-16"]
AWKWARD = """data.added_tokens=["<|a|>", "it's"]"""


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


def watch(stubs, states, workers, *options, nodes="READY", output="gs://bucket/mine"):
    """Runs watch; returns its actions as letters (Create, Install, Start, Delete, Log) and its exit code.

    ``states`` are those of the queued resource, ``workers`` those of the workers ("75,running"), or "dead".
    """
    stubs.answer(
        f"""
        case "$*" in
            *'queued-resources describe'*)
                state=$(take states)
                case $state in
                    NOT_FOUND) echo 'ERROR: NOT_FOUND: Resource' >&2; exit 1 ;;
                    '' | BROKEN) echo 'ERROR: no network' >&2; exit 1 ;;
                esac
                echo "$state" ;;
            *'tpu-vm describe'*) echo {nodes} ;;
            *'worker.sh state'*)
                answer=$(take workers)
                [ "$answer" != dead ] || exit 255
                printf 'sft-jax: state=%s host\\n' ${{answer//,/ }} ;;
            *'tail -n 20'*) echo 'the end of the log' ;;
        esac
        """,
        states=states,
        workers=workers,
    )
    words = ["--", stubs.config, f"training.output_dir={output}"]
    done = stubs.run("tpu_vm.sh", "watch", "mine", *TPU, "--poll=0", "--source", stubs.source, *options, *words)
    actions = ""
    for call in stubs.calls("gcloud"):
        text = " ".join(call)
        for what, letter in {
            " create ": "C",
            "worker.sh install": "I",
            "worker.sh start": "S",
            " delete ": "D",
        }.items():
            actions += letter if what in text else ""
        actions += "L" if "tail -n 20" in text else ""
    assert (stubs.folder / "states").read_text() == ""  # all answers were used
    return actions, done.returncode


@pytest.mark.parametrize(
    ("states", "workers", "actions", "code"),
    [
        ("NOT_FOUND WAITING_FOR_RESOURCES PROVISIONING ACTIVE ACTIVE ACTIVE", "absent running 0,0", "CIS", 0),
        ("ACTIVE ACTIVE", "none 0", "S", 0),  # installed by hand
        ("ACTIVE ACTIVE ACTIVE", "75,running 75,75 0,0", "S", 0),  # waits until all have ended
        ("ACTIVE ACTIVE", "gone,75 0,0", "S", 0),  # a host was restarted
        ("ACTIVE SUSPENDING SUSPENDED CREATING ACTIVE ACTIVE", "running absent,absent 0,0", "DCIS", 0),
        ("ACTIVE ACTIVE SUSPENDED ACTIVE ACTIVE", "75,75 137,75 absent 0", "SDCIS", 0),  # preempted while it started
        ("ACTIVE ACTIVE ACTIVE", "75,75 75 0,0", "S", 0),  # one of two slices does not answer for a while
        ("ACTIVE", "2,2", "L", 2),
        ("ACTIVE", "2,running", "L", 2),
        ("ACTIVE ACTIVE ACTIVE", "75 75 2", "SSL", 2),
        ("ACTIVE ACTIVE", "1,1 1,1", "L", 1),
        ("ACTIVE SUSPENDED ACTIVE ACTIVE", "1,143 absent 0", "DCIS", 0),
        ("FAILED ACTIVE ACTIVE", "absent 0", "DCIS", 0),
        (" ".join(["FAILED"] * 5), "", "DCDCDCDCL", 1),
        ("BROKEN ACTIVE", "0", "", 0),
        (" ".join(["BROKEN"] * 10), "", "L", 1),
        (" ".join(["ACTIVE"] * 10), " ".join(["dead"] * 10), "L", 1),
    ],
)
def test_watch(stubs, states, workers, actions, code):
    assert watch(stubs, states.split(), workers.split()) == (actions, code)


def test_watch_options(stubs):
    assert watch(stubs, ["ACTIVE"], ["0"], "--delete-at-end") == ("D", 0)
    assert watch(stubs, ["ACTIVE"], ["2"], "--delete-at-end") == ("LD", 2)
    assert watch(stubs, ["ACTIVE"] * 3, ["75"] * 3, "--max-restarts=2") == ("SSL", 75)
    assert watch(stubs, ["ACTIVE"] * 3, ["dead", "absent", "0"], nodes="PREEMPTED") == ("DCIS", 0)
    gone = {"nodes": "PREEMPTED"}  # before the queued resource reports it
    assert watch(stubs, ["ACTIVE"] * 4, ["75,75", "75", "absent,absent", "0,0"], **gone) == ("SDCIS", 0)
    assert watch(stubs, ["ACTIVE"] * 3, ["2", "absent", "0"], **gone) == ("DCIS", 0)
    assert watch(stubs, ["ACTIVE"], ["0"], output="/mnt/shared/mine") == ("", 0)


def test_watch_needs_an_output_that_survives_the_slice(stubs):
    for text, code in (
        ("training: {seed: 1}\n", 2),
        ("training:\n  output_dir: runs/mine\n", 2),
        ("training:\n  output_dir: 'gs://bucket/mine'  # there\n", 0),
    ):
        stubs.config.write_text(text)
        words = ["--", stubs.config, "training.seed=1"]
        assert stubs.run("tpu_vm.sh", "watch", "mine", *TPU, "--dry-run", *words).returncode == code


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def installed(stubs, text):
    """Installs a script as the worker's sft-jax."""
    program = stubs.home / ".sft-jax" / "venv" / "bin" / "sft-jax"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)


def state(stubs):
    return re.fullmatch(r"sft-jax: state=(\w+) \S+\n", stubs.run("worker.sh", "state").stdout)[1]


@pytest.mark.parametrize("code", [0, 2, 75])
def test_worker_keeps_the_exit_code(stubs, code):
    installed(stubs, f'echo "$@"; exit {code}')
    assert state(stubs) == "none"
    assert stubs.run("worker.sh", "start", "a=b", AWKWARD).returncode == 0
    wait_until(lambda: state(stubs) != "running")
    assert state(stubs) == str(code)
    home = stubs.home / ".sft-jax"
    assert (home / "train.log").read_text() == f"train {home}/config.yaml a=b {AWKWARD}\n"


def test_worker_stops_and_survives_a_signal(stubs):
    installed(stubs, "trap 'echo asked; exit 75' TERM; echo up; while :; do /bin/sleep 0.02; done")
    home = stubs.home / ".sft-jax"
    log = home / "train.log"
    assert stubs.run("worker.sh", "start").returncode == 0
    wait_until(lambda: log.exists() and log.read_text() == "up\n")
    assert state(stubs) == "running"
    again = stubs.run("worker.sh", "start")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    supervisor = int((home / "pid").read_text().split()[0])
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(supervisor)], check=True)  # as at a shutdown of the host
    assert stubs.run("worker.sh", "stop").returncode == 0
    wait_until(lambda: state(stubs) != "running")
    assert state(stubs) == "75"
    assert log.read_text() == "up\nasked\n"
    assert stubs.run("worker.sh", "stop").returncode == 0  # nothing to do
    (home / "exit_code").unlink()
    (home / "pid").write_text("1 of-another-boot")
    assert state(stubs) == "gone"


def test_worker_environment(stubs):
    installed(stubs, 'test "$HF_TOKEN" = secret')
    env = stubs.home / ".sft-jax" / "env"
    env.write_text("HF_TOKEN=secret\n")
    done = stubs.run("worker.sh", "start")
    assert done.stdout + done.stderr == ""
    wait_until(lambda: state(stubs) == "0")
    assert env.stat().st_mode & 0o777 == 0o600
    env.write_text("HF_TOKEN='secret\n")
    done = stubs.run("worker.sh", "start")
    assert done.returncode == 2
    assert state(stubs) == "0"


def test_watch_end_to_end(stubs):
    """gcloud runs its commands on this machine as the worker; the run is preempted once and restarted once."""
    stubs.answer(
        r"""
        worker=$HOME/worker
        case "$name $*" in
            'sleep '*) /bin/sleep 0.05 ;;
            *'queued-resources describe'*)
                [ -d "$worker" ] || { echo NOT_FOUND >&2; exit 1; }
                if [ -e "$STUBS/preempted" ] && [ ! -e "$STUBS/was" ]; then echo SUSPENDED; else echo ACTIVE; fi ;;
            *'queued-resources create'*) mkdir "$worker" ;;
            *'queued-resources delete'*)
                touch "$STUBS/was"
                kill -9 "$(cut -d ' ' -f 1 "$worker/.sft-jax/pid")"
                kill "$(cat "$worker/.sft-jax/child")"
                rm -r "$worker" ;;
            *'queued-resources scp'*) cp "$5" "$worker/${6#mine:}" ;;
            *'queued-resources ssh'*)
                for word in "$@"; do case $word in --command=*) command=${word#*=} ;; esac; done
                cd "$worker" && HOME=$worker bash -c "$command" ;;
            'uv venv '*) mkdir -p .sft-jax/venv/bin ;;
            'uv pip '*) cp "$STUBS/program" .sft-jax/venv/bin/sft-jax ;;
        esac
        """
    )
    program = stubs.folder / "program"  # does one step per run, in an output that survives the slice
    program.write_text(
        """#!/usr/bin/env bash
        [ "$1" = train ] || exit 0
        out=${3#training.output_dir=}
        echo step >>"$out"
        case $(wc -l <"$out") in
            1) exit 75 ;;
            2) touch "$STUBS/preempted"; exec /bin/sleep 60 ;;
        esac
        """
    )
    program.chmod(0o755)
    out = stubs.home / "out"
    words = ["--source", stubs.source, "--delete-at-end", "--", stubs.config, f"training.output_dir={out}"]
    done = stubs.run("tpu_vm.sh", "watch", "mine", *TPU, *words)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == "step\n" * 3
    calls = [" ".join(call) for call in stubs.calls("gcloud")]
    assert sum("worker.sh start" in call for call in calls) == 3
    assert sum("worker.sh install" in call for call in calls) == 2
    assert [call.split()[4] for call in calls if call.split()[4] in ("create", "delete")] == ["create", "delete"] * 2
    assert "delete" in calls[-1]
