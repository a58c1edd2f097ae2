"""Each exit code of the table in configs/README.md, by what it says."""

import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from kit import ROOT, child_environment, config_of, losses, make_model, run_config, sft_jax
from safetensors.numpy import load_file, save_file

from sft_jax import config_file

# A shell makes what it starts in the background ignore Ctrl-C.
PROGRAM = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
PROGRAM += "from sft_jax.__main__ import run; sys.exit(run())"


def interrupted(number, tiny, chats, tmp_path):
    """A training that gets a signal after its first step."""
    config_file.save(config_of(tiny, chats, tmp_path / "run", training__max_steps=100_000), tmp_path / "config.yaml")
    command = [sys.executable, "-c", PROGRAM, "train", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=child_environment())
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.is_file() and losses(tmp_path / "run")):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, "", err)


def done(tiny, chats, tmp_path, monkeypatch):
    config_file.save(run_config(tiny, chats, tmp_path / "run"), tmp_path / "config.yaml")
    return sft_jax("inspect", tmp_path / "config.yaml")


def difference(tiny, chats, tmp_path, monkeypatch):
    """A model with a weight that is not finite."""
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = min(tensors)
    tensors[name] = np.full_like(tensors[name], jnp.nan)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return sft_jax("check", model)


def user_error(tiny, chats, tmp_path, monkeypatch):
    return sft_jax("train", tmp_path / "none.yaml")


def bug(tiny, chats, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sft_jax.api.train", fail)
    config_file.save(run_config(tiny, chats, tmp_path / "run"), tmp_path / "config.yaml")
    return sft_jax("train", tmp_path / "config.yaml")


CASES = {
    0: (done, ""),
    1: (difference, ""),
    2: (user_error, "none.yaml: no such config file"),
    70: (
        bug,
        "an error that sft-jax does not know at .*: RuntimeError: a bug; its traceback is in .*; please report it",
    ),
    75: (
        lambda tiny, chats, tmp_path, _: interrupted(signal.SIGTERM, tiny, chats, tmp_path),
        r"asked to stop; step \d+ is saved; the same command resumes there",
    ),
    130: (
        lambda tiny, chats, tmp_path, _: interrupted(signal.SIGINT, tiny, chats, tmp_path),
        r"interrupted after step \d+; (nothing is saved yet|step \d+ is saved, the same command resumes there)",
    ),
}


@pytest.mark.parametrize("code", CASES)
def test_exit_code(code, tiny, chats, tmp_path, monkeypatch):
    case, line = CASES[code]
    ended = case(tiny, chats, tmp_path, monkeypatch)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    if line:
        assert re.fullmatch(f"sft-jax: .*{line}", ended.stderr.strip().splitlines()[-1])


@pytest.mark.smoke
def test_the_table_names_each():
    page = (ROOT / "configs" / "README.md").read_text()
    table = page.partition("## Exit codes")[2].partition("## ")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(CASES)


def test_a_stuck_thread_does_not_keep_a_failed_command():
    """The checkpoint library leaves threads that wait for ten minutes where a checkpoint could not be written."""
    program = (
        "import sys, threading, time; threading.Thread(target=time.sleep, args=(1000,)).start(); "
        "sys.argv = ['sft-jax', 'recipes', 'zx81']; from sft_jax.__main__ import run; sys.exit(run())"
    )
    environment = child_environment()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (2, "sft-jax: no recipe has 'zx81'; sft-jax recipes lists all\n")
