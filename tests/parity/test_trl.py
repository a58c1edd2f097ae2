"""The loss of each of twenty steps equals that of TRL + PEFT on the same rows in the same order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kit import losses, make_model, one_device, run_config, write_chats

from sft_jax.config import LoraConfig
from sft_jax.run.train import train


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_losses(mode, tmp_path):
    model = make_model(tmp_path / "model", tie_word_embeddings=mode == "full")
    data = write_chats(tmp_path / "chats.jsonl", num=80, seed=3)
    script = Path(__file__).parent / "trl_reference.py"
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(data), str(tmp_path), mode],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = json.loads((tmp_path / "losses.json").read_text())
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 0.5  # it did learn

    lora = None if mode == "full" else LoraConfig(rank=4, alpha=8.0, init_from=str(tmp_path / "adapter"))
    config = run_config(
        model,
        data,
        tmp_path / "run",
        lora=lora,
        data__packing=False,
        data__shuffle=False,
        training__max_steps=20,
        optimizer__learning_rate=3e-3,
    )
    train(config, one_device())
    ours = losses(tmp_path / "run")
    print("largest relative difference", np.max(np.abs(np.array(ours) / expected - 1)))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
