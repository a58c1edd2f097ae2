"""tools/cloud on SLURM, GKE and local GPUs, against stubs: the processes that run, and the exit codes that restart."""

import os
import re
import signal
import time

import pytest
import yaml
from stubs import CLOUD, Stubs

WHEEL = "gs://bucket/sft_jax-0.1.0-py3-none-any.whl"
AWKWARD = """data.added_tokens=["<|a|>", "it's \\"b\\" \\\\ $HOME"]"""


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


# SLURM

JOB = {"SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "n[07-08]"}
SRUN = """
    case $name in
        srun) shift; [ -z "${END:-}" ] || kill -TERM "$PPID"; SLURM_PROCID=1 "$@" >&2; exit "$CODE" ;;
        squeue) echo "${STATE:-RUNNING}" ;;
        scontrol) [ "$1" != show ] || printf 'n07\\nn08\\n' ;;
    esac
"""
REQUEUE = ["scontrol", "requeue", "70001"]


def in_job(stubs, code=0, nodes=1, tasks=1, **env):
    stubs.answer(SRUN)
    shape = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NTASKS": str(tasks)}
    done = stubs.run("slurm.sh", "run", stubs.config, "a=b", **JOB, **shape, CODE=str(code), **env)
    assert done.returncode == code, done.stderr
    return stubs.calls()


def test_slurm_submits_itself(stubs):
    done = stubs.run("slurm.sh", "--nodes=2", "--gpus-per-node=8", "--", stubs.config, AWKWARD)
    assert done.returncode == 0, done.stderr
    script = str(CLOUD / "slurm.sh")
    flags = ["--nodes=2", "--gpus-per-node=8"]
    assert stubs.calls() == [["sbatch", *flags, script, "run", str(stubs.config), AWKWARD]]
    lines = (CLOUD / "slurm.sh").read_text().splitlines()
    directives = [
        line.removeprefix("#SBATCH ") for line in lines[1:8]
    ]  # sbatch ignores directives after the first command
    assert {"--requeue", "--ntasks-per-node=1", "--signal=TERM@300", "--open-mode=append"} <= set(directives)


def test_slurm_processes(stubs):
    train = ["sft-jax", "train", str(stubs.config), "a=b"]
    srun = ["srun", "--kill-on-bad-exit=0"]
    assert in_job(stubs) == [[*srun, *train, "--num-processes", "1"], [*train, "--num-processes", "1"]]
    # One process per node: explicit arguments, since JAX's own detection would use one GPU. The port is JAX's choice.
    hosts, launched, process = in_job(stubs, nodes=2, tasks=2)
    assert hosts == ["scontrol", "show", "hostnames", "n[07-08]"]
    assert launched[:2] == srun
    port = 70001 % 2**12 + (65535 - 2**12 + 1)
    others = ["--coordinator", f"n07:{port}", "--num-processes", "2", "--process-id", "1"]
    assert process == [*train, *others]
    # One process per GPU: JAX detects the cluster.
    assert in_job(stubs, nodes=2, tasks=16) == [[*srun, *train], train]
    assert in_job(stubs, SLURM_CPUS_PER_TASK="32")[0][:3] == [*srun, "--cpus-per-task=32"]


@pytest.mark.parametrize(
    ("code", "env", "again"),
    [
        (75, {}, True),
        (75, {"END": "yes"}, True),  # the signal reaches this shell too
        (75, {"STATE": "COMPLETING"}, False),  # scancel
        (75, {"SLURM_RESTART_COUNT": "99"}, True),
        (75, {"SLURM_RESTART_COUNT": "100"}, False),
        (75, {"SLURM_RESTART_COUNT": "3", "SFT_JAX_MAX_RESTARTS": "3"}, False),
        (2, {}, False),
        (1, {}, False),
        (137, {}, False),
        (0, {}, False),
    ],
)
def test_slurm_requeues(stubs, code, env, again):
    assert (REQUEUE in in_job(stubs, code, **env)) == again


# GKE


def render(stubs, *options, words=()):
    done = stubs.run("gke.sh", "render", "mine", "--package", WHEEL, *options, "--", stubs.config, *words)
    assert done.returncode == 0, done.stderr
    assert not re.search("@[A-Z]", done.stdout.rpartition("\n---\n")[2])  # no placeholder is left
    config, jobset = yaml.safe_load_all(done.stdout)
    [job] = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert config["metadata"]["name"] == jobset["metadata"]["name"] == "mine"
    return config, jobset, job, pod


@pytest.mark.parametrize(
    ("topology", "options", "label", "hosts", "chips"),
    [
        ("v5e:4x4", [], "tpu-v5-lite-podslice", 4, 4),
        ("v5e:1x1", [], "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x2", [], "tpu-v5-lite-podslice", 1, 4),
        ("v5e:2x4", [], "tpu-v5-lite-podslice", 1, 8),
        ("v5e:2x4", ["--chips-per-host=4"], "tpu-v5-lite-podslice", 2, 4),
        ("v5e:16x16", [], "tpu-v5-lite-podslice", 64, 4),
        ("v6e:8x8", [], "tpu-v6e-slice", 16, 4),
        ("v5p:4x4x4", [], "tpu-v5p-slice", 16, 4),
        ("v5p:2x2x1", [], "tpu-v5p-slice", 1, 4),
        ("v4:2x2x4", [], "tpu-v4-podslice", 4, 4),
    ],
)
def test_tpu_manifest(stubs, topology, options, label, hosts, chips):
    _, jobset, job, pod = render(stubs, "--topology", topology, "--slices=3", *options)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"]["annotations"] == exclusive
    assert job["replicas"] == 3
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (hosts, hosts)
    google = "cloud.google.com/gke-tpu-"
    assert pod["nodeSelector"] == {f"{google}accelerator": label, f"{google}topology": topology.split(":")[1]}
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}


def test_gpu_manifest(stubs):
    _, jobset, job, pod = render(stubs, "--topology=h100:8", "--nodes=4", "--spot", "--cuda=12")
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True}
    assert (job["name"], job["replicas"], job["template"]["spec"]["completions"]) == ("node", 1, 4)
    google = "cloud.google.com/gke-"
    assert pod["nodeSelector"] == {f"{google}accelerator": "nvidia-h100-80gb", f"{google}spot": "true"}
    container = pod["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"} in container["env"]
    script = container["command"][2]
    assert "sft-jax[cuda12] @" in script
    others = "--coordinator mine-node-0-0.mine:12321 --num-processes 4"
    assert script.endswith(f'train /config/config.yaml "$@" {others} --process-id "$JOB_COMPLETION_INDEX"')
    script = render(stubs, "--topology=h100:8")[3]["containers"][0]["command"][2]
    assert script.endswith('"$@" --num-processes 1')


def test_restart_policies(stubs):
    """The two policies of Kubernetes and JobSet; the first rule that matches applies."""
    for topology in ("v5e:4x4", "h100:8"):
        _, jobset, job, pod = render(stubs, "--topology", topology, "--max-restarts=7")
        policy = jobset["spec"]["failurePolicy"]
        assert policy["maxRestarts"] == 7
        assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
        spec = job["template"]["spec"]
        assert spec["backoffLimit"] == 0  # any other failed pod fails its job, and the JobSet restarts
        preempted, failed = spec["podFailurePolicy"]["rules"]
        conditions = [{"type": "DisruptionTarget", "status": "True"}]
        assert preempted == {"action": "Count", "onPodConditions": conditions}
        assert (failed["action"], failed["onExitCodes"]["operator"]) == ("FailJob", "In")
        assert failed["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
        assert failed["onExitCodes"]["values"] == [1, 2]
        assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy


def test_config_and_arguments_arrive(stubs):
    stubs.config.write_text("  # indented at first\na: 'it''s'\nb: \"\\t@NAME@\"\n\nc: |\n  x: &y\n")
    config, _, _, pod = render(stubs, "--topology=v5e:4x4", words=["a=b", AWKWARD, "c=\td"])
    assert config["data"]["config.yaml"] == stubs.config.read_text()
    container = pod["containers"][0]
    assert container["args"] == ["a=b", AWKWARD, "c=\td"]
    # Run the pod's script with stubs.
    python = stubs.folder / "bin" / "python"
    python.write_bytes((stubs.folder / "bin" / "pip").read_bytes())
    python.chmod(0o755)
    done = stubs.run(*container["command"], *container["args"])
    assert done.returncode == 0, done.stderr
    gcsfs, fetch, install, train = stubs.calls()
    assert gcsfs == ["pip", "install", "--quiet", "gcsfs"]
    assert fetch[-1] == WHEEL
    assert install == ["pip", "install", "--quiet", f"sft-jax[tpu] @ file:///tmp/wheel/{WHEEL.rpartition('/')[2]}"]
    assert train == ["sft-jax", "train", "/config/config.yaml", "a=b", AWKWARD, "c=\td"]


def test_kubectl_and_xpk(stubs):
    package = ["--package=git+https://example.org/sft.git@v1"]
    stubs.answer('[ "$name" != kubectl ] || [ "$1" != apply ] || cat >"$STUBS/manifest"')
    words = ["--", stubs.config, "a=b"]
    assert stubs.run("gke.sh", "train", "mine", "--topology=v5e:4x4", *package, *words).returncode == 0
    shown = stubs.run("gke.sh", "render", "mine", "--topology=v5e:4x4", *package, *words).stdout
    assert (stubs.folder / "manifest").read_text() == shown
    assert stubs.calls() == [["kubectl", "apply", "-f", "-"]]
    for verb in ("status", "logs", "delete"):
        assert stubs.run("gke.sh", verb, "mine").returncode == 0
    label = "jobset.sigs.k8s.io/jobset-name=mine"
    jobset, pods, logs, delete = stubs.calls()
    assert jobset == ["kubectl", "get", "jobset", "mine"]
    assert pods[1:5] == ["get", "pods", "-l", label]
    assert logs[:4] == ["kubectl", "logs", "-f", "-l"]
    assert logs[4].startswith(f"{label},")
    assert delete[1:4] == ["delete", "jobset/mine", "configmap/mine"]

    for topology, kind in (("v5e:4x4", "v5litepod-16"), ("v5p:2x2x4", "v5p-32"), ("v6e:8x8", "v6e-64")):
        flags = [f"--topology={topology}", "--cluster=c", "--slices=2", "--zone=z"]
        assert stubs.run("gke.sh", "xpk", "mine", *flags, *package, "--", stubs.config, AWKWARD).returncode == 0
        [call] = stubs.calls()
        assert call[:5] == ["xpk", "workload", "create", "--workload=mine", "--cluster=c"]
        more = {f"--tpu-type={kind}", "--num-slices=2", "--zone=z", "--docker-image=python:3.12"}
        assert more | {"--max-restarts=100", "--restart-on-exit-codes=75"} <= set(call)
    command = re.sub("/config(?=[/;])", str(stubs.folder / "config"), call[-1].removeprefix("--command="))
    done = stubs.run("bash", "-c", command)
    assert done.returncode == 0, done.stderr
    placed = stubs.folder / "config" / "config.yaml"
    assert placed.read_text() == stubs.config.read_text()
    source = "sft-jax[tpu] @ git+https://example.org/sft.git@v1"
    assert stubs.calls() == [["pip", "install", "--quiet", "gcsfs", source], ["sft-jax", "train", str(placed), AWKWARD]]


# Local GPUs

GPUS = 'case $name in nvidia-smi) printf "0\\n1\\n2\\n" ;; sft-jax) %s ;; esac'


def test_processes_on_this_machine(stubs):
    stubs.answer(GPUS % 'echo "gpu $CUDA_VISIBLE_DEVICES"')
    words = ["--", stubs.config, "a=b"]
    train = ["sft-jax", "train", str(stubs.config), "a=b"]
    done = stubs.run("local_gpus.sh", "--gpus=4,5", *words)
    assert (done.returncode, done.stdout) == (0, "gpu 4,5\n")
    assert stubs.calls() == [[*train, "--num-processes", "1"]]
    assert stubs.run("local_gpus.sh", *words, CUDA_VISIBLE_DEVICES="7").stdout == "gpu 7\n"
    stubs.calls()

    done = stubs.run("local_gpus.sh", "--process-per-gpu", *words)
    assert (done.returncode, done.stdout) == (0, "gpu 0\n")
    others = ["--coordinator", "127.0.0.1:12321", "--num-processes", "3", "--process-id"]
    assert sorted(stubs.calls("sft-jax")) == [[*train, *others, str(i)] for i in range(3)]
    assert [(stubs.home / f"sft-jax-gpu-{i}.log").read_text() for i in range(3)] == [f"gpu {i}\n" for i in range(3)]


@pytest.mark.parametrize(
    ("codes", "code"), [("0 0 0", 0), ("75 75 75", 75), ("75 2 75", 2), ("2 75 1", 2), ("1 75 75", 1), ("75 1 0", 1)]
)
def test_exit_code_of_several(stubs, codes, code):
    stubs.answer(GPUS % f'set -- {codes}; shift "$CUDA_VISIBLE_DEVICES"; exit "$1"')
    assert stubs.run("local_gpus.sh", "--process-per-gpu", "--", stubs.config).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("each", [[], ["--process-per-gpu"]])
def test_signals_are_passed_on_once(stubs, each, number):
    program = 'trap "echo asked >>$STUBS/asked; left=20" TERM; left=-1; echo up >>"$STUBS/up"; '
    program += 'while [ "$left" -ne 0 ]; do /bin/sleep 0.02; left=$((left - 1)); done; exit 75'
    stubs.answer(GPUS % program)
    running = stubs.start("local_gpus.sh", "--gpus=0,1", *each, "--", stubs.config)
    count = 2 if each else 1
    up, asked = stubs.folder / "up", stubs.folder / "asked"

    def wait_for_lines(path, word):
        end = time.monotonic() + 30
        while not (path.exists() and path.read_text() == f"{word}\n" * count):
            assert time.monotonic() < end
            time.sleep(0.02)

    try:
        wait_for_lines(up, "up")
        os.kill(running.pid, number)
        wait_for_lines(asked, "asked")
        os.kill(running.pid, number)  # a second signal while they save
        assert running.wait(30) == 75
    finally:
        running.kill()
    assert asked.read_text() == "asked\n" * count
