"""tools/cloud: what the scripts run, and how the one that watches a TPU slice decides. Against stubs, never a cloud."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from stubs import CLOUD, Stubs, tool

ZONE = ["--project", "p", "--zone", "us-west4-a"]
PLACE = ["--project=p", "--zone=us-west4-a"]
TPU = ["--accelerator-type", "v5litepod-16"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--node=all", "--worker=all", "--quiet"]
WORKER = "bash .sft-jax/source/tools/cloud/worker.sh"
AWKWARD = """data.added_tokens=["<|a|>", "it's"]"""


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


def scripts():
    return sorted(CLOUD.glob("*.sh"))


def test_shellcheck():
    assert len(scripts()) == 7
    done = subprocess.run(
        [tool("shellcheck"), "-x", *scripts()], cwd=CLOUD.parent.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh", "gke.sh", "local_gpus.sh"])
def test_help(stubs, script):
    done = stubs.run(script, "--help")
    assert done.returncode == 0
    assert f"{script} " in done.stdout
    assert "--dry-run" in done.stdout
    assert "SBATCH" not in done.stdout
    assert not stubs.calls()


def commands(stubs):
    """Every verb once, or with other options."""
    config, run = stubs.config, ["--", stubs.config, "training.seed=3", AWKWARD]
    source = ["--source", stubs.source]
    package = ["--package", "gs://bucket/sft_jax-0.1.0-py3-none-any.whl"]
    yield ["tpu_vm.sh", "create", "mine", *TPU]
    yield ["tpu_vm.sh", "create", "mine", *TPU, *ZONE, "--spot", "--slices=4", "--create-arg=--network=it's"]
    yield ["tpu_vm.sh", "wait", "mine"]
    yield ["tpu_vm.sh", "install", "mine", *ZONE, *source]
    yield ["tpu_vm.sh", "train", "mine", *ZONE, "--env-file", config, "--ssh-arg=--tunnel-through-iap", *run]
    yield ["tpu_vm.sh", "logs", "mine", "--node=1", "--worker=3"]
    yield ["tpu_vm.sh", "status", "mine"]
    yield ["tpu_vm.sh", "stop", "mine"]
    yield ["tpu_vm.sh", "delete", "mine", *ZONE]
    yield ["tpu_vm.sh", "watch", "mine", *TPU, *source, "--poll=0", "--delete-at-end", *run]
    yield ["slurm.sh", "--nodes=4", "--gpus-per-node=8", "--comment=a b", *run]
    yield ["gke.sh", "train", "mine", "--topology=v6e:8x8", "--slices=2", *package, *run]
    yield ["gke.sh", "train", "mine", "--topology=h100:8", "--nodes=2", *package, *run]
    yield ["gke.sh", "xpk", "mine", "--topology=v5p:2x2x4", "--cluster=c", *package, *run]
    yield ["gke.sh", "status", "mine"]
    yield ["gke.sh", "logs", "mine"]
    yield ["gke.sh", "delete", "mine"]
    yield ["local_gpus.sh", *run]
    yield ["local_gpus.sh", "--gpus=2,3", "--process-per-gpu", *run]


@pytest.mark.parametrize("i", range(19))
def test_dry_run_shows_what_is_run(stubs, i):
    cases = list(commands(stubs))
    assert len(cases) == 19
    script, *words = cases[i]
    where = words.index("--") if "--" in words else len(words)
    answer = """
        case "$*" in
            *'apply -f -') cat >>"$STUBS/manifest" ;;
            *' describe '*) take states | grep -v NOT_FOUND || { echo NOT_FOUND >&2; exit 1; } ;;
            *'worker.sh state '*) echo "sft-jax: state=$(take workers) host" ;;
        esac
    """
    # As it goes when all is well: no slice, a new slice, a run that has ended.
    first = "NOT_FOUND" if "watch" in words else "ACTIVE"
    lists = {"states": [first, "ACTIVE", "ACTIVE"], "workers": ["absent", "0"]}
    stubs.answer(answer, **lists)
    shown = stubs.run(script, *words[:where], "--dry-run", *words[where:])
    assert shown.returncode == 0, shown.stderr
    assert not stubs.calls()

    pasted = stubs.run("bash", "-c", shown.stdout)
    assert pasted.returncode in (0, 1)  # 1: the first look at a slice that is not there
    by_hand = stubs.calls()
    assert by_hand
    stubs.answer(answer, **lists)
    done = stubs.run(script, *words)
    assert done.returncode == 0, done.stderr
    itself = stubs.calls()
    if script == "local_gpus.sh":  # at once
        by_hand, itself = sorted(by_hand), sorted(itself)
    assert itself == by_hand
    manifest = stubs.folder / "manifest"
    if manifest.exists():
        text = manifest.read_text()
        assert text[: len(text) // 2] == text[len(text) // 2 :]


def test_arguments_of_gcloud(stubs):
    def called(*words):
        done = stubs.run("tpu_vm.sh", *words)
        assert done.returncode == 0, done.stderr
        return stubs.calls()

    v5e = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert called("create", "mine", *TPU, *ZONE) == [[*QUEUED, "create", "mine", *v5e, "--node-id=mine", *PLACE]]
    more = ["--spot", "--slices", "2", "--valid-until-duration", "6h", "--create-arg", "--internal-ips"]
    nodes = ["--node-count=2", "--node-prefix=mine"]
    flags = ["--spot", "--valid-until-duration=6h", "--internal-ips"]
    assert called("create", "mine", *TPU, *more) == [[*QUEUED, "create", "mine", *v5e, *nodes, *flags]]
    for kind, runtime in (("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")):
        assert f"--runtime-version={runtime}" in called("create", "mine", "--accelerator-type", kind)[0]
    assert "--runtime-version=x" in called("create", "mine", *TPU, "--version", "x")[0]

    assert called("delete", "mine", *ZONE) == [[*QUEUED, "delete", "mine", "--force", "--quiet", *PLACE]]
    scp, ssh = called("install", "mine", *ZONE, "--source", stubs.source)
    archive = stubs.home / ".cache" / "sft-jax" / "mine.tar.gz"
    assert scp == [*QUEUED, "scp", str(archive), "mine:sft-jax.tar.gz", *EVERYWHERE, *PLACE]
    assert ssh[:-3] == [*QUEUED, "ssh", "mine", *EVERYWHERE]
    assert ssh[-3].endswith(f"tar -xzf sft-jax.tar.gz -C .sft-jax/source && {WORKER} install")
    scp, ssh = called("train", "mine", "--", stubs.config, "training.seed=3", AWKWARD)
    assert scp == [*QUEUED, "scp", str(stubs.config), "mine:.sft-jax/config.yaml", *EVERYWHERE]
    quoted = """'data.added_tokens=["<|a|>", "it'\\''s"]'"""
    assert ssh == [*QUEUED, "ssh", "mine", *EVERYWHERE, f"--command={WORKER} start training.seed=3 {quoted}"]
    assert called("logs", "mine", "--worker=3")[0][4:-1] == ["ssh", "mine", "--node=0", "--worker=3", "--quiet"]


def watch(stubs, states, workers, *options, nodes="READY", output="gs://bucket/mine"):
    """What the watch does at these answers, one letter a deed, and its exit code: Create, Install, Start, Delete, Log.

    ``states`` are those of the queued resource, ``workers`` what the workers say ("75,running"), or "dead".
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
                said=$(take workers)
                [ "$said" != dead ] || exit 255
                printf 'sft-jax: state=%s host\\n' ${{said//,/ }} ;;
            *'tail -n 20'*) echo 'the end of the log' ;;
        esac
        """,
        states=states,
        workers=workers,
    )
    words = ["--", stubs.config, f"training.output_dir={output}"]
    done = stubs.run("tpu_vm.sh", "watch", "mine", *TPU, "--poll=0", "--source", stubs.source, *options, *words)
    deeds = ""
    for call in stubs.calls("gcloud"):
        text = " ".join(call)
        for what, letter in {
            " create ": "C",
            "worker.sh install": "I",
            "worker.sh start": "S",
            " delete ": "D",
        }.items():
            deeds += letter if what in text else ""
        deeds += "L" if "tail -n 20" in text else ""
    assert (stubs.folder / "states").read_text() == ""  # it looked as often as it was said to, and not once more
    return deeds, done.returncode


@pytest.mark.parametrize(
    ("states", "workers", "deeds", "code"),
    [
        ("NOT_FOUND WAITING_FOR_RESOURCES PROVISIONING ACTIVE ACTIVE ACTIVE", "absent running 0,0", "CIS", 0),
        ("ACTIVE ACTIVE", "none 0", "S", 0),  # installed by hand
        ("ACTIVE ACTIVE ACTIVE", "75,running 75,75 0,0", "S", 0),  # waits until all have ended
        ("ACTIVE ACTIVE", "gone,75 0,0", "S", 0),  # a host was restarted
        ("ACTIVE SUSPENDING SUSPENDED CREATING ACTIVE ACTIVE", "running absent,absent 0,0", "DCIS", 0),
        ("ACTIVE ACTIVE SUSPENDED ACTIVE ACTIVE", "75,75 137,75 absent 0", "SDCIS", 0),  # it went while it started
        ("ACTIVE ACTIVE ACTIVE", "75,75 75 0,0", "S", 0),  # a slice of two is out of reach for a while
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
def test_watch(stubs, states, workers, deeds, code):
    assert watch(stubs, states.split(), workers.split()) == (deeds, code)


def test_watch_options(stubs):
    assert watch(stubs, ["ACTIVE"], ["0"], "--delete-at-end") == ("D", 0)
    assert watch(stubs, ["ACTIVE"], ["2"], "--delete-at-end") == ("LD", 2)
    assert watch(stubs, ["ACTIVE"] * 3, ["75"] * 3, "--max-restarts=2") == ("SSL", 75)
    assert watch(stubs, ["ACTIVE"] * 3, ["dead", "absent", "0"], nodes="PREEMPTED") == ("DCIS", 0)
    gone = {"nodes": "PREEMPTED"}  # before the queued resource says so
    assert watch(stubs, ["ACTIVE"] * 4, ["75,75", "75", "absent,absent", "0,0"], **gone) == ("SDCIS", 0)
    assert watch(stubs, ["ACTIVE"] * 3, ["2", "absent", "0"], **gone) == ("DCIS", 0)
    assert watch(stubs, ["ACTIVE"], ["0"], output="/mnt/shared/mine") == ("", 0)


def test_watch_wants_an_output_that_outlives_the_slice(stubs):
    for text, code in (
        ("training: {seed: 1}\n", 2),
        ("training:\n  output_dir: runs/mine\n", 2),
        ("training:\n  output_dir: 'gs://bucket/mine'  # there\n", 0),
    ):
        stubs.config.write_text(text)
        words = ["--", stubs.config, "training.seed=1"]
        assert stubs.run("tpu_vm.sh", "watch", "mine", *TPU, "--dry-run", *words).returncode == code


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def installed(stubs, text):
    """A worker with this as its sft-jax."""
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
    until(lambda: state(stubs) != "running")
    assert state(stubs) == str(code)
    home = stubs.home / ".sft-jax"
    assert (home / "train.log").read_text() == f"train {home}/config.yaml a=b {AWKWARD}\n"


def test_worker_stops_and_outlives_a_signal(stubs):
    installed(stubs, "trap 'echo asked; exit 75' TERM; echo up; while :; do /bin/sleep 0.02; done")
    home = stubs.home / ".sft-jax"
    log = home / "train.log"
    assert stubs.run("worker.sh", "start").returncode == 0
    until(lambda: log.exists() and log.read_text() == "up\n")
    assert state(stubs) == "running"
    again = stubs.run("worker.sh", "start")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    supervisor = int((home / "pid").read_text().split()[0])
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(supervisor)], check=True)  # as when the host goes down
    assert stubs.run("worker.sh", "stop").returncode == 0
    until(lambda: state(stubs) != "running")
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
    until(lambda: state(stubs) == "0")
    assert env.stat().st_mode & 0o777 == 0o600
    env.write_text("HF_TOKEN='secret\n")
    done = stubs.run("worker.sh", "start")
    assert done.returncode == 2
    assert state(stubs) == "0"


def test_the_whole_way(stubs):
    """gcloud carries out what it is told on "workers" that are this machine; preempted once, asked to go on once."""
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
    program = stubs.folder / "program"  # each time it goes a step on, in what outlives the slice
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


def test_secrets_are_not_shown(stubs):
    env = Path(stubs.home / "secrets")
    env.write_text("HF_TOKEN=hf_do_not_show\n")
    words = ["train", "mine", "--env-file", env, "--", stubs.config]
    for dry in ([], ["--dry-run"]):
        done = stubs.run("tpu_vm.sh", *words[:4], *dry, *words[4:])
        assert done.returncode == 0
        assert "do_not_show" not in done.stdout + done.stderr + str(stubs.calls())


def mistakes(config):
    run = ["--", config]
    yield "tpu_vm.sh fly mine", "fly: no such verb"
    yield "tpu_vm.sh create", "the name of the slice is missing"
    yield ["tpu_vm.sh", "create", "My_TPU", *TPU], "'My_TPU'"
    yield "tpu_vm.sh create mine", "--accelerator-type: is missing"
    yield "tpu_vm.sh create mine --accelerator-type tpu7x-8", "--runtime-version: is missing"
    yield ["tpu_vm.sh", "create", "mine", *TPU, "--slices=0"], "--slices: '0'"
    yield ["tpu_vm.sh", "create", "mine", *TPU, *run], "create takes no config"
    yield "tpu_vm.sh delete mine --force", "--force: no such option"
    yield "tpu_vm.sh delete mine --zone", "--zone: needs a value"
    yield "tpu_vm.sh train mine", "nothing to train"
    yield "tpu_vm.sh train mine -- absent.yaml", "absent.yaml: no such config file"
    yield ["tpu_vm.sh", "train", "mine", *run, "--seed"], "--seed: is not key=value"
    yield ["tpu_vm.sh", "train", "mine", "--env-file=absent", *run], "--env-file: no such file absent"
    yield "tpu_vm.sh install mine --source=/", "--source: / is not a source tree"
    yield ["tpu_vm.sh", "watch", "mine", *TPU, "--poll=soon", *run], "--poll: 'soon'"
    yield ["tpu_vm.sh", "watch", "mine", *TPU, *run, "training.output_dir=runs/a"], "would go with the slice"
    yield ["slurm.sh", "--nodes", "4", *run], "4: options of sbatch are written --name=value"
    yield "slurm.sh --nodes=4", "nothing to train"
    yield ["slurm.sh", "run", config], "is for SLURM to call"
    yield ["gke.sh", "train", "mine", "--topology=v5e:4x4", *run], "--package: is missing"
    package = "--package=gs://b/c.whl"
    for topology in ("v9:4x4", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v5e:4xa", "v5e:0x4", "h100:eight"):
        yield ["gke.sh", "render", "mine", package, f"--topology={topology}", *run], f"--topology: '{topology}'"
    yield ["gke.sh", "render", "mine", package, "--topology=h100:8", "--slices=2", *run], "GPUs have --nodes"
    yield ["gke.sh", "render", "mine", package, "--topology=v5e:4x4", "--nodes=2", *run], "--nodes: is for GPUs"
    yield ["gke.sh", "render", "mine", package, "--topology=v5e:4x4", "--chips-per-host=3", *run], "does not divide"
    yield ["gke.sh", "xpk", "mine", package, "--topology=h100:8", *run], "xpk: TPUs only"
    yield ["gke.sh", "xpk", "mine", package, "--topology=v5e:4x4", *run], "--cluster: is missing"
    yield ["gke.sh", "delete", "mine", *run], "delete takes no config"
    yield ["local_gpus.sh", "--gpus=0;1", *run], "--gpus: '0;1'"
    yield ["local_gpus.sh", "--port=http", *run], "--port: 'http'"
    yield "local_gpus.sh", "nothing to train"


def test_a_mistake_is_one_line(stubs):
    for words, expected in mistakes(stubs.config):
        done = stubs.run(*(words.split() if isinstance(words, str) else words))
        assert done.returncode == 2, words
        assert done.stderr.count("\n") == 1, (words, done.stderr)
        assert expected in done.stderr, (words, done.stderr)
        assert done.stdout == ""
        assert not stubs.calls()


def test_without_gcloud(stubs):
    (stubs.folder / "bin" / "gcloud").unlink()
    assert stubs.run("bash", "-c", "command -v gcloud").returncode == 1
    done = stubs.run("tpu_vm.sh", "delete", "mine")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert stubs.run("tpu_vm.sh", "delete", "mine", "--dry-run").returncode == 0
