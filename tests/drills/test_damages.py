"""Damage to any file of a run, a base model, an export or the token cache is named or healed, never used silently."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from kit import child_environment, trained_leaves
from small_run import STEPS, make_run
from warm import Warm


def flip(content: bytearray, rng: np.random.Generator) -> bytearray:
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return content


def zeros(content: bytearray, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(content)))
    stop = min(len(content), start + int(rng.integers(1, 512)))
    content[start:stop] = bytes(stop - start)
    return content


def cut(content: bytearray, rng: np.random.Generator) -> bytearray:
    return content[: rng.integers(len(content))]


def moved(content: bytearray, rng: np.random.Generator) -> bytearray:
    at = int(rng.integers(len(content)))
    return content[:at] + bytearray(rng.bytes(int(rng.integers(1, 64)))) + content[at:]


KINDS = {"flip": flip, "zeros": zeros, "cut": cut, "moved": moved, "gone": lambda content, rng: None}


class Damage:
    """Changes one file of a folder, chosen at random, each part of the folder as often as any other."""

    def __init__(self, folder: Path, rng: np.random.Generator):
        files = sorted(one for one in folder.rglob("*") if one.is_file() and one.stat().st_size)
        groups: dict[str, list[Path]] = {}
        for file in files:
            parts = file.relative_to(folder).parts
            group = "/".join(parts[:3]) if parts[0] == "checkpoints" else "/".join((*parts[:-1], file.suffix))
            groups.setdefault(group, []).append(file)
        group = groups[str(rng.choice(sorted(groups)))]
        self.file = group[int(rng.integers(len(group)))]
        self.kind = str(rng.choice(list(KINDS)))
        content = KINDS[self.kind](bytearray(self.file.read_bytes()), rng)
        if content is None:
            self.file.unlink()
        else:
            self.file.write_bytes(content)
        self.where = f"{self.kind} of {self.file.relative_to(folder)}"


@pytest.fixture(scope="module")
def warm():
    with Warm(**child_environment()) as warm:
        yield warm


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """A folder with a base model, data, a run with checkpoints of the steps 4 and 6, a token cache and an export."""
    return make_run(warm, tmp_path_factory.mktemp("whole"), ["export", "run", "merged", "--format", "merged"])


def same_files(one: Path, other: Path) -> bool:
    names = [sorted(file.name for file in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names[0] if name != "README.md"
    )


def same_run(one: Path, other: Path) -> bool:
    leaves = [trained_leaves(folder, STEPS) for folder in (one, other)]
    return all(np.array_equal(leaves[0][path], leaves[1][path]) for path in leaves[0])


@pytest.mark.drill("sft_jax/files", "sft_jax/run", "sft_jax/store", "sft_jax/hf", "sft_jax/data/tokens")
@pytest.mark.parametrize(
    ("command", "part"),
    [("train", "run"), ("train", "base"), ("train", "cache"), ("export", "run"), ("export", "base")],
)
def test_damages(command, part, warm, whole, tmp_path, is_full):
    """After damage, the command gives the same result as without, or refuses it in one line."""
    rng = np.random.default_rng([len(part), len(command)])
    outcomes: Counter[str] = Counter()
    for number in range(100 if is_full else 3):
        here = tmp_path / str(number)
        shutil.copytree(whole, here)
        damage = Damage(here / part, rng)
        options = {"cwd": here, "environment": {"SFT_JAX_CACHE": "cache"}}
        if command == "train":
            if part == "cache":
                shutil.rmtree(here / "run")
            else:
                shutil.rmtree(here / "cache")
            ended = warm.run("train", "config.yaml", **options)
            same = ended.code != 0 or same_run(whole / "run", here / "run")
        else:
            out = here / "out"
            ended = warm.run("export", "run", "out", "--format", "merged", "--base", "base", **options)
            same = ended.code != 0 or same_files(whole / "merged", out)
            assert ended.code == 0 or not out.exists(), damage.where
        assert ended.is_clean, f"{damage.where}: {ended.code}\n{ended.err}"
        assert same, f"{damage.where}: another result, and nothing was said: {ended.err}"
        said = re.search("damage", ended.err) is not None
        outcomes["refused" if ended.code else "said and healed" if said else "not read"] += 1
        shutil.rmtree(here)
    print(f"{command}, {part}: {dict(outcomes)}")
