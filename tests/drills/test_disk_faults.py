"""A full disk, missing permissions, limits of a process, wherever a command writes: one line, and nothing is lost."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from faults import small_disk
from kit import child_environment, trained_leaves
from small_run import STEPS, make_run
from warm import Ended, Warm

KIB = 1024


@pytest.fixture(scope="module")
def warm():
    with Warm(**child_environment(PYTHONWARNINGS="")) as warm:
        yield warm


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """A folder with a base model, data and a run with checkpoints of the steps 4 and 6."""
    return make_run(warm, tmp_path_factory.mktemp("whole"))


def commands(out: str, is_full: bool = True) -> dict[str, list[str]]:
    """Each command that writes, into the folder ``out``."""
    names = None if is_full else ("train", "merged")
    every = {
        "train": ["train", "config.yaml", f"training.output_dir={out}/run"],
        "train with TensorBoard": [
            "train", "config.yaml", f"training.output_dir={out}/run", "training.tensorboard=true",
        ],
        "merged": ["export", "run", f"{out}/model", "--format", "merged"],
        "adapter": ["export", "run", f"{out}/model", "--format", "adapter"],
    }  # fmt: skip
    return {name: command for name, command in every.items() if names is None or name in names}


class Faults:
    """Runs commands under faults, and counts how they ended."""

    def __init__(self, warm: Warm, whole: Path, folder: Path):
        self.warm, self.whole, self.folder = warm, whole, folder
        self.outcomes: Counter[str] = Counter()
        self.number = 0

    def fresh(self) -> Path:
        self.number += 1
        here = self.folder / str(self.number)
        shutil.copytree(self.whole, here)
        return here

    def run(self, here: Path, command: list[str], what: str, **options) -> Ended:
        environment = {"SFT_JAX_CACHE": "cache"} | options.pop("environment", {})
        ended = self.warm.run(*command, cwd=here, environment=environment, before="faults.obey_permissions", **options)
        said = ended.err.strip().splitlines()[-1:]
        assert ended.is_clean, f"{what}: {ended.code}\n{ended.err}"
        self.outcomes["went on" if ended.code == 0 else f"code {ended.code}"] += 1
        print(f"{what}: {ended.code} {said if ended.code else ''}")
        return ended

    def and_again(self, here: Path, command: list[str], what: str, out: Path) -> None:
        """Without the fault, the same command ends as it would have."""
        shutil.rmtree(out / "model", ignore_errors=True)
        ended = self.warm.run(*command, cwd=here, environment={"SFT_JAX_CACHE": "cache"})
        assert ended.code == 0, f"{what}: {ended.err}"
        if command[0] == "train":
            leaves = [trained_leaves(one, STEPS) for one in (self.whole / "run", out / "run")]
            assert all(np.array_equal(leaves[0][path], leaves[1][path]) for path in leaves[0]), what
        left = [one.name for one in out.iterdir() if one.name not in ("run", "model")]
        assert not left, f"{what}: {left}"
        shutil.rmtree(here)


@pytest.mark.drill("sft_jax/files", "sft_jax/run", "sft_jax/store", "sft_jax/hf")
def test_full_disk(warm, whole, tmp_path, is_full):
    faults = Faults(warm, whole, tmp_path)
    sizes = [4, 64, 128, 256, 384, 512, 768] if is_full else [256]
    for (name, command), size in product(commands("disk", is_full).items(), sizes):
        here, what = faults.fresh(), f"{name} on {size} KiB"
        with small_disk(here / "disk", size * KIB) as is_small:
            limits = {} if is_small else {"RLIMIT_FSIZE": size * KIB}
            faults.run(here, command, what, limits=limits)
            shutil.copytree(here / "disk", here / "larger")
        faults.and_again(here, commands("larger")[name], what, here / "larger")
    print(f"full disk: {dict(faults.outcomes)}")


@pytest.mark.drill("sft_jax/files", "sft_jax/run", "sft_jax/store", "sft_jax/hf")
def test_limits_of_the_process(warm, whole, tmp_path, is_full):
    faults = Faults(warm, whole, tmp_path)
    limits = [("RLIMIT_FSIZE", size * KIB) for size in (0, 1, 16, 64)]
    limits += [("RLIMIT_NOFILE", count) for count in (24, 40, 64)]
    cases = product(commands("out", is_full).items(), limits if is_full else limits[2::3])
    for (name, command), (key, limit) in cases:
        here, what = faults.fresh(), f"{name} with {key} {limit}"
        (here / "out").mkdir()
        faults.run(here, command, what, limits={key: limit})
        faults.and_again(here, command, what, here / "out")
    print(f"limits of the process: {dict(faults.outcomes)}")


PLACES = {
    "output folder": "out", "run": "out/run", "checkpoints": "out/run/checkpoints", "report": "out/run/report",
    "token cache": "cache", "cached tokens": "cache/tokens", "base": "base", "data": "chats.jsonl",
    "config": "config.yaml", "temporary folder": "tmp", "weights": "base/model.safetensors", "the run": "run",
    "the run's checkpoints": "run/checkpoints", "the run's tokenizer": "run/tokenizer",
}  # fmt: skip


@pytest.mark.drill("sft_jax/files", "sft_jax/run", "sft_jax/store", "sft_jax/hf")
def test_permissions(warm, whole, tmp_path, is_full):
    faults = Faults(warm, whole, tmp_path)
    modes = [(place, (0o555, 0o000)[i % 2]) for i, place in enumerate(PLACES)]
    cases = product(commands("out", is_full).items(), modes if is_full else modes[::5])
    for (name, command), (place, mode) in cases:
        here, what = faults.fresh(), f"{name} with {place} of mode {mode:o}"
        (here / "tmp").mkdir()
        (here / "out").mkdir()
        if PLACES[place].startswith("out/run"):
            shutil.copytree(here / "run", here / "out" / "run")
            shutil.rmtree(here / "out" / "run" / "checkpoints" / "6")
        if "cache" in place or name.startswith("train"):
            shutil.rmtree(here / "cache" / "tokens")
            (here / "cache" / "tokens").mkdir()
        path = here / PLACES[place]
        before = path.stat().st_mode
        path.chmod(mode)
        try:
            faults.run(here, command, what, environment={"TMPDIR": str(here / "tmp")})
        finally:
            path.chmod(before)
        faults.and_again(here, command, what, here / "out")
    print(f"permissions: {dict(faults.outcomes)}")


@pytest.mark.drill("sft_jax/files", "sft_jax/run", "sft_jax/store", "sft_jax/hf")
def test_files_in_place_of_folders(warm, whole, tmp_path, is_full):
    faults = Faults(warm, whole, tmp_path)
    places = (
        "out",
        "out/run",
        "out/model",
        "out/run/checkpoints",
        "out/run/report",
        "out/run/tokenizer",
        "cache",
        "tmp",
    )
    for (name, command), place in product(commands("out", is_full).items(), places if is_full else places[1::4]):
        here, what = faults.fresh(), f"{name} with a file at {place}"
        shutil.rmtree(here / "cache")
        (here / place).parent.mkdir(parents=True, exist_ok=True)
        (here / place).write_text("a file")
        faults.run(here, command, what, environment={"TMPDIR": str(here / "tmp")})
        assert (here / place).read_text() == "a file", what
        shutil.rmtree(here)
    print(f"files in place of folders: {dict(faults.outcomes)}")
