"""A killed and resumed run is bit for bit equal to an uninterrupted one."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from kit import child_environment, config_of, trained_leaves

from sft_jax import config_file as configs

STEPS = 160


def command(path):
    return [sys.executable, "-m", "sft_jax", "train", str(path)]


@pytest.mark.drill("sft_jax")
def test_killed_three_times(tiny, chats, tmp_path):
    environment = child_environment()
    for name in ("whole", "killed"):
        configs.save(config_of(tiny, chats, tmp_path / name, training__max_steps=STEPS), tmp_path / f"{name}.yaml")
    subprocess.run(command(tmp_path / "whole.yaml"), check=True, env=environment, capture_output=True, timeout=300)

    metrics = tmp_path / "killed" / "metrics.jsonl"
    kills = []
    for after in (10, 70, 125):  # before the first checkpoint, between two checkpoints, and late
        process = subprocess.Popen(
            command(tmp_path / "killed.yaml"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            done = metrics.read_text().count("\n") if metrics.exists() else 0
            if done >= after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        kills.append(metrics.read_text().count("\n"))
    assert kills == sorted(kills)
    last = subprocess.run(
        command(tmp_path / "killed.yaml"), env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert "resume  at step" in last.stderr

    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert [row["step"] for row in rows[1]] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate", "real_tokens"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]
    whole, killed = (trained_leaves(tmp_path / name, STEPS) for name in ("whole", "killed"))
    assert all(np.array_equal(whole[path], killed[path]) for path in whole)
