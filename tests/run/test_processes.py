"""Runs of several real processes: they have the same losses and data as one process, and end together."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from kit import Group, child_environment, losses, run_config, sft_jax
from safetensors.numpy import load_file

from sft_jax.config_file import to_dict
from sft_jax.hf.reader import TensorReader
from sft_jax.store.checkpoint import Checkpoints

STEPS = 24


@pytest.fixture(scope="module")
def config(tiny, chats, tmp_path_factory) -> Path:
    """A run with all that could differ between processes: shuffling, packing, dropout, evaluation, samples."""
    folder = tmp_path_factory.mktemp("processes")
    values = to_dict(
        run_config(
            tiny,
            chats,
            "unset",
            training__max_steps=STEPS,
            training__save_every=8,
            training__eval_every=12,
            lora__dropout=0.1,
        )
    )
    values["data"] |= {"eval": [{"path": str(chats), "max_rows": 10}], "leave_out": ["leaks"]}
    values["evaluation"] |= {"samples": ["river bread"], "samples_every": 12, "max_new_tokens": 8, "num_questions": 3}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """The run directory of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = sft_jax("train", config, f"training.output_dir={out}")
    assert done.returncode == 0, done.stderr
    return out


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Check that batches and samples are equal, and losses agree within a relative tolerance."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for key in ("target_tokens", "real_tokens", "samples"):
            assert a.get(key) == b.get(key)
        for key in a.keys() & {"loss", "grad_norm", "eval_loss"}:
            np.testing.assert_allclose(a[key], b[key], rtol=tolerance)


@pytest.mark.long
def test_resumed_by_other_numbers_of_processes(config, alone, tmp_path):
    """Two processes stop at a SIGTERM to one of them; four resume on another mesh and stop; one process finishes."""
    run = tmp_path / "run"
    arguments = ("train", config, f"training.output_dir={run}")
    for count, target, step, mesh in ((2, 1, 3, []), (4, 0, 10, ["mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2"])):
        group = Group(count, *arguments, *mesh)
        group.wait_for(run, step)
        group.processes[target].send_signal(signal.SIGTERM)
        assert group.wait() == [75] * count, group.stderr
        assert all(re.search(r"asked to stop; step \d+ is saved", stderr) for stderr in group.stderr)
        assert "devices" in group.stderr[0]  # only process 0 prints
        assert "left out  10 leaks" in group.stderr[0]
        assert not any("devices" in stderr for stderr in group.stderr[1:])
    done = sft_jax(*arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, run)


# Runs several commands in the same processes, which connect only once.
_COMMANDS = """
import json, sys
from contextlib import nullcontext
from sft_jax import cli
from sft_jax.distributed import processes
options = sys.argv[-6:]
with processes.joined(options[1], int(options[3]), int(options[5])):
    processes.joined = lambda *_: nullcontext()
    for command in json.loads(sys.argv[1]):
        if code := cli.main([*command, *options]):
            sys.exit(code)
"""


@pytest.mark.long
def test_two_processes_from_the_start_to_the_export(config, tmp_path):
    """The final evaluation, the report and both exports are the same as those of one process."""
    summaries = {}
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        keys = ["training.max_steps=3", "evaluation.at_end=true", "training.eval_every=100", "lora.dropout=0"]
        keys += [
            "optimizer.eps=1.0",
            "optimizer.learning_rate=0.1",
        ]  # else rounding of small gradients matters
        commands = [("train", config, f"training.output_dir={run}", *keys)]
        commands += [("export", run, tmp_path / f"{form}{count}", "--format", form) for form in ("adapter", "merged")]
        if count == 1:
            for command in commands:
                done = sft_jax(*command)
                assert done.returncode == 0, done.stderr
        else:
            group = Group(count, json.dumps(commands, default=str), python=_COMMANDS)
            assert group.wait() == [0] * count, group.stderr
        summaries[count] = json.loads((run / "report" / "summary.json").read_text())
    for name, metrics in summaries[1].items():
        for key, value in metrics.items():
            np.testing.assert_allclose(summaries[2][name][key], value, rtol=1e-4, atol=1e-7, err_msg=key)
    adapters = [load_file(tmp_path / f"adapter{count}" / "adapter_model.safetensors") for count in (1, 2)]
    merged = [TensorReader(tmp_path / f"merged{count}") for count in (1, 2)]
    assert len(list((tmp_path / "merged2").glob("*.safetensors"))) >= 2  # each process writes files
    for name, tensor in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], tensor, atol=1e-6)
        assert "lora_B" not in name or np.abs(tensor).max() > 1e-4  # starts at zero; 100 times the tolerance
    for name in merged[0].names:
        np.testing.assert_allclose(merged[1].read(name), merged[0].read(name), atol=1e-6)
    assert {file.name for file in (tmp_path / "merged1").iterdir()} - {"model.safetensors"} <= {
        file.name for file in (tmp_path / "merged2").iterdir()
    }


def test_one_process_stops_and_resumes(config, alone, tmp_path):
    """A run of one process that stops at SIGTERM and resumes is bit for bit the same."""
    run = tmp_path / "run"
    environment = child_environment(PYTHONUNBUFFERED="1")
    command = [sys.executable, "-m", "sft_jax", "train", str(config), f"training.output_dir={run}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and len(losses(run) if (run / "metrics.jsonl").is_file() else []) < 11:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert sft_jax("train", config, f"training.output_dir={run}").returncode == 0
    assert_same_run(alone, run, tolerance=0)


@pytest.mark.parametrize("target", [0, 1])
def test_a_killed_process_ends_all(config, tmp_path, target):
    """The other process ends and prints which process is gone."""
    run = tmp_path / "run"
    group = Group(2, "train", config, f"training.output_dir={run}", "training.max_steps=100000", "--timeout", 4)
    group.wait_for(run, 2)
    group.processes[target].kill()
    start = time.monotonic()
    codes = group.wait(90)
    assert codes[target] == -signal.SIGKILL
    assert codes[1 - target] != 0
    assert time.monotonic() - start < 60
    if target == 1:
        assert codes[0] == 75
        assert "process 0: no heartbeat from process 1 for 4 s" in group.stderr[0], group.stderr[0]
    else:
        assert "process 0, which coordinates the run, is gone" in group.stderr[1] or "leader task" in group.stderr[1]


def test_an_error_of_one_process_ends_all(config, tmp_path):
    """The other process prints the same error and ends with the same exit code."""
    python = (
        "import sys, jax; from sft_jax import cli; from sft_jax.run import start\n"
        "from sft_jax.errors import UserError\n"
        "def bad(config, *_):\n"
        "    if jax.process_index() == 1: raise UserError('data.train: no such file on this host')\n"
        "    return config\n"
        "start.settle_attention = bad\n"
        "sys.exit(cli.main())"
    )
    group = Group(2, "train", config, f"training.output_dir={tmp_path / 'run'}", python=python)
    assert group.wait(120) == [2, 2], group.stderr
    assert "process 1: data.train: no such file on this host" in group.stderr[1]
    assert "process 0: process 1 failed: data.train: no such file on this host" in group.stderr[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_stream_of_two_processes_resumes_in_one(config, tmp_path):
    """Each of the two processes saves half of the stream position; batches and losses are those of one process."""
    keys = ["data.streaming=true", "data.leave_out=[]"]
    keys += ["training.max_steps=8", "training.save_every=4", "training.eval_every=100"]
    alone, run = tmp_path / "alone", tmp_path / "run"
    done = sft_jax("train", config, *keys, f"training.output_dir={alone}")
    assert done.returncode == 0, done.stderr
    group = Group(2, "train", config, *keys, f"training.output_dir={run}")
    assert group.wait() == [0, 0], group.stderr
    assert_same_run(alone, run)
    shutil.rmtree(run / "checkpoints" / "8")
    done = sft_jax("train", config, *keys, f"training.output_dir={run}")
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", "2"], "--coordinator: is missing"),
        (
            ["--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
            "--coordinator: 'here' is not HOST:PORT",
        ),
        (
            ["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id: 2 is not between 0 and 1",
        ),
    ],
)
def test_bad_arguments(config, arguments, message):
    done = sft_jax("train", config, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_kept_checkpoints(config, tmp_path):
    """A run keeps the newest checkpoint, the one with the lowest held-out loss, and every twelfth step."""
    run = tmp_path / "run"
    keys = ["save_every=4", "eval_every=4", "keep_checkpoints=1", "keep_best=1", "keep_every=12", f"output_dir={run}"]
    done = sft_jax("train", config, *(f"training.{key}" for key in keys), "optimizer.learning_rate=0.2")
    assert done.returncode == 0, done.stderr
    eval_losses = {row["step"]: row["eval_loss"] for row in rows(run) if "eval_loss" in row and row["step"] > 0}
    best = min(eval_losses, key=lambda step: eval_losses[step])
    checkpoints = Checkpoints(run / "checkpoints")
    assert set(checkpoints.steps()) == {best, 12, 24}
    checkpoints.close()
