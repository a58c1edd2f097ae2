"""Fifty thousand steps of a tiny model: memory, open files, threads and the time of a step do not grow."""

import os
from pathlib import Path

import numpy as np
import pytest
from kit import child_environment, config_of, make_model, write_chats
from warm import Warm

from sft_jax import config_file as configs
from sft_jax.store.metrics import read_metrics

SIZES = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def state_of(pid: int) -> tuple[float, int, int] | None:
    """Resident memory in MB, number of open files, number of threads; None after its end."""
    process = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    if "VmRSS" not in status:
        return None
    return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(process / "fd")), int(status["Threads"])


@pytest.mark.drill("sft_jax/run", "sft_jax/store", "sft_jax/data/batches", "sft_jax/training")
def test_endurance(tmp_path, is_full):
    steps = 50_000 if is_full else 1_500
    model = make_model(tmp_path / "model", **SIZES)
    chats = write_chats(tmp_path / "chats.jsonl", 400)
    keys = {
        "training__max_steps": steps,
        "training__save_every": steps // 50,
        "training__eval_every": steps // 50,
        "training__batch_size": 1,
        "data__max_length": 128,
        "training__tensorboard": True,
    }
    configs.save(config_of(model, chats, tmp_path / "run", **keys), tmp_path / "config.yaml")
    held_out = f"data.eval=[{{path: {chats}, max_rows: 4}}]"
    samples = []
    with Warm(**child_environment()) as warm:
        life = warm.start("train", tmp_path / "config.yaml", held_out)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while life.is_running(steps / 5_000):
            if metrics.exists() and (state := state_of(life.pid)) is not None:
                samples.append(state)
        ended = life.wait()
    assert ended.code == 0, ended.err
    rows = [row for row in read_metrics(metrics) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    memory, files, threads = np.asarray(samples[len(samples) // 5 :]).T
    step = np.asarray([row["step_seconds"] for row in rows])
    fifth = steps // 5
    slope = np.polyfit(np.linspace(0, 1, len(memory)), memory, 1)[0]
    first, last = (np.median(part) * 1e3 for part in (step[fifth : 2 * fifth], step[-fifth:]))
    print(
        f"{steps:,} steps: memory {memory[0]:.0f} MB, {slope:+.1f} MB over the last four fifths; open files "
        f"{files.min():.0f} to {files.max():.0f}; threads {threads.min():.0f} to {threads.max():.0f}; a step "
        f"{first:.2f} ms in the second fifth, {last:.2f} ms in the last"
    )
    assert slope < 60
    # A checkpoint that is being written holds files open; a run that ends has already closed its own.
    assert files.max() - np.median(files) < 40
    assert np.median(files[-len(files) // 5 :]) <= np.median(files[: len(files) // 5]) + 2
    assert np.median(threads[-len(threads) // 5 :]) <= np.median(threads[: len(threads) // 5]) + 4
