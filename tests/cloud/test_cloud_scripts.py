"""tools/cloud against stubs: the commands that the scripts run, and their user errors."""

import subprocess
from pathlib import Path

import pytest
from stubs import CLOUD, Stubs, tool

ZONE = ["--project", "p", "--zone", "us-west4-a"]
LOCATION = ["--project=p", "--zone=us-west4-a"]
TPU = ["--accelerator-type", "v5litepod-16"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
ALL_WORKERS = ["--node=all", "--worker=all", "--quiet"]
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
    """Every verb, some with several sets of options."""
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
def test_dry_run_prints_the_commands(stubs, i):
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
    # A run without errors: no slice, a new slice, a run that has ended.
    first = "NOT_FOUND" if "watch" in words else "ACTIVE"
    lists = {"states": [first, "ACTIVE", "ACTIVE"], "workers": ["absent", "0"]}
    stubs.answer(answer, **lists)
    shown = stubs.run(script, *words[:where], "--dry-run", *words[where:])
    assert shown.returncode == 0, shown.stderr
    assert not stubs.calls()

    pasted = stubs.run("bash", "-c", shown.stdout)
    assert pasted.returncode in (0, 1)  # 1: describe fails before the slice exists
    by_hand = stubs.calls()
    assert by_hand
    stubs.answer(answer, **lists)
    done = stubs.run(script, *words)
    assert done.returncode == 0, done.stderr
    itself = stubs.calls()
    if script == "local_gpus.sh":  # processes run concurrently
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
    assert called("create", "mine", *TPU, *ZONE) == [[*QUEUED, "create", "mine", *v5e, "--node-id=mine", *LOCATION]]
    more = ["--spot", "--slices", "2", "--valid-until-duration", "6h", "--create-arg", "--internal-ips"]
    nodes = ["--node-count=2", "--node-prefix=mine"]
    flags = ["--spot", "--valid-until-duration=6h", "--internal-ips"]
    assert called("create", "mine", *TPU, *more) == [[*QUEUED, "create", "mine", *v5e, *nodes, *flags]]
    for kind, runtime in (("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")):
        assert f"--runtime-version={runtime}" in called("create", "mine", "--accelerator-type", kind)[0]
    assert "--runtime-version=x" in called("create", "mine", *TPU, "--version", "x")[0]

    assert called("delete", "mine", *ZONE) == [[*QUEUED, "delete", "mine", "--force", "--quiet", *LOCATION]]
    scp, ssh = called("install", "mine", *ZONE, "--source", stubs.source)
    archive = stubs.home / ".cache" / "sft-jax" / "mine.tar.gz"
    assert scp == [*QUEUED, "scp", str(archive), "mine:sft-jax.tar.gz", *ALL_WORKERS, *LOCATION]
    assert ssh[:-3] == [*QUEUED, "ssh", "mine", *ALL_WORKERS]
    assert ssh[-3].endswith(f"tar -xzf sft-jax.tar.gz -C .sft-jax/source && {WORKER} install")
    scp, ssh = called("train", "mine", "--", stubs.config, "training.seed=3", AWKWARD)
    assert scp == [*QUEUED, "scp", str(stubs.config), "mine:.sft-jax/config.yaml", *ALL_WORKERS]
    quoted = """'data.added_tokens=["<|a|>", "it'\\''s"]'"""
    assert ssh == [*QUEUED, "ssh", "mine", *ALL_WORKERS, f"--command={WORKER} start training.seed=3 {quoted}"]
    assert called("logs", "mine", "--worker=3")[0][4:-1] == ["ssh", "mine", "--node=0", "--worker=3", "--quiet"]


def test_secrets_are_not_printed(stubs):
    env = Path(stubs.home / "secrets")
    env.write_text("HF_TOKEN=hf_do_not_show\n")
    words = ["train", "mine", "--env-file", env, "--", stubs.config]
    for dry in ([], ["--dry-run"]):
        done = stubs.run("tpu_vm.sh", *words[:4], *dry, *words[4:])
        assert done.returncode == 0
        assert "do_not_show" not in done.stdout + done.stderr + str(stubs.calls())


def user_errors(config):
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
    yield "tpu_vm.sh train mine", "no config; end the command"
    yield "tpu_vm.sh train mine -- absent.yaml", "absent.yaml: no such config file"
    yield ["tpu_vm.sh", "train", "mine", *run, "--seed"], "--seed: not of the form key=value"
    yield ["tpu_vm.sh", "train", "mine", "--env-file=absent", *run], "--env-file: no such file absent"
    yield "tpu_vm.sh install mine --source=/", "--source: / is not a source tree"
    yield ["tpu_vm.sh", "watch", "mine", *TPU, "--poll=soon", *run], "--poll: 'soon'"
    yield ["tpu_vm.sh", "watch", "mine", *TPU, *run, "training.output_dir=runs/a"], "would be lost with the slice"
    yield ["slurm.sh", "--nodes", "4", *run], "4: write sbatch options as --name=value"
    yield "slurm.sh --nodes=4", "no config; end the command"
    yield ["slurm.sh", "run", config], "run: only for SLURM"
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
    yield "local_gpus.sh", "no config; end the command"


def test_a_user_error_is_one_line(stubs):
    for words, expected in user_errors(stubs.config):
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
