"""A run whose power is cut at any moment continues, bit for bit as undisturbed.

The run directory is on a file system in an image file. A copy of the image at some moment is what a disk would hold if
the power were cut then: whatever was not flushed is missing. Needs the right to mount, which is root's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kit import child_environment, config_of, trained_leaves
from warm import Warm

from sft_jax import config_file as configs
from sft_jax.store.metrics import read_metrics

STEPS, EVERY = 60, 4
IMAGE_BYTES = 64 << 20


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image; the kernel writes to it what was not flushed only every five seconds, as on any machine."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    image = folder / "probe"
    try:
        make_image(image)
        with mounted(image, folder / "mounted"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        image.unlink(missing_ok=True)


def make_image(image: Path) -> None:
    with image.open("wb") as file:
        os.truncate(file.fileno(), IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)


@pytest.mark.drill("sft_jax/store", "sft_jax/files", "sft_jax/run")
def test_power_loss(tiny, chats, tmp_path, is_full):
    if not can_mount(tmp_path):
        print("not measured: this user cannot mount file systems")
        return
    quota = 60 if is_full else 3
    rng = np.random.default_rng(0)
    config, outcomes = tmp_path / "config.yaml", Counter()
    keys = {"training__max_steps": STEPS, "training__save_every": EVERY}
    configs.save(config_of(tiny, chats, tmp_path / "whole", **keys), config)
    with Warm(**child_environment()) as warm:
        assert warm.run("train", config).code == 0
        whole = trained_leaves(tmp_path / "whole", STEPS)
        image, cut = tmp_path / "image", tmp_path / "cut"
        number = 0
        while number < quota:
            make_image(image)
            with mounted(image, tmp_path / "disk") as disk:
                life = warm.start("train", config, f"training.output_dir={disk}/run")
                while life.is_running(rng.uniform(0.05, 0.8)) and number < quota:
                    subprocess.run(["cp", "--sparse=always", str(image), f"{cut}-{number}"], check=True)
                    number += 1
                life.wait()
        for one in range(number):
            shutil.move(f"{cut}-{one}", cut)
            with mounted(cut, tmp_path / "after") as after:
                ended = warm.run("train", config, f"training.output_dir={after}/run")
                assert ended.code == 0, ended.err
                found = trained_leaves(after / "run", STEPS)
                assert all(np.array_equal(whole[path], found[path]) for path in whole)
                steps = [row["step"] for row in read_metrics(after / "run" / "metrics.jsonl")]
                assert steps == list(range(1, STEPS + 1)), steps
                resumed = re.search(r"resume  at step (\d+)", ended.err)
                kind = f"resumed at step {resumed[1]}" if resumed else "began anew"
                damage = re.search("damage  .*", ended.err)
                outcomes[kind + (", one set aside" if damage else "")] += 1
            cut.unlink()
    print(f"{number} power cuts: {dict(sorted(outcomes.items()))}")
