"""A model or an adapter with files that are wrong in any way is read rightly, or refused in one line."""

from __future__ import annotations

import os
import shutil
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hostile import config, files, tokenizers, weights
from hostile.variant import Variant
from kit import run_config
from warm import Ended, Warm

from sft_jax import config_file as configs

pytestmark = pytest.mark.drill(
    "sft_jax/hf",
    "sft_jax/models/families",
    "sft_jax/models/architecture.py",
    "sft_jax/data/chat",
    "sft_jax/assembly.py",
)
ROOMS = {"config": config, "weights": weights, "tokenizers": tokenizers, "files": files}
SECONDS = 10.0  # more processor time than a good folder takes
BYTES = 2**30  # more memory than a good folder takes, and than the folder's size
ADDRESSES = 16 * 2**30  # the machine is not to suffer from what takes too much
SAMPLE = 96  # one in so many variants is drilled when the drill is not at full size


class Bench:
    """Good folders, and the commands that read copies of them."""

    def __init__(self, warm: Warm, folder: Path, tiny: Path, chats: Path):
        self.warm, self.folder, self.tiny = warm, folder, tiny
        self.yaml, self.run, self.adapter = folder / "good.yaml", folder / "run", folder / "adapter"
        changes = {"training__max_steps": 1, "training__batch_size": 2, "data__cache": False}
        configs.save(run_config(tiny, chats, folder / "run", **changes), self.yaml)
        for arguments in (["train", self.yaml], ["export", self.run, self.adapter]):
            done = warm.run(*arguments)
            assert done.code == 0, done.err
        self._count = 0
        self.good = {name: self.do(Variant("good", lambda _: None, name)) for name in self.commands(tiny, "")}
        for name, one in self.good.items():
            assert one.code == 0, (name, one.err)

    def commands(self, copy: Path, name: str) -> dict[str, list]:
        out = self.folder / f"out{name}"
        train = ["train", self.yaml, f"training.output_dir={out}"]
        return {
            "train": [*train, f"model.path={copy}"],
            "generate": ["generate", copy, "--prompt", "river", "--max-new-tokens", 2],
            "check": ["check", copy],
            "export": ["export", self.run, out, "--base", copy],
            "init": [*train, f"lora.init_from={copy}"],
        }

    def do(self, variant: Variant) -> Ended:
        """Make the folder of a variant, and run its command."""
        self._count += 1
        name = str(self._count)
        copy = self.folder / f"copy{name}"
        shutil.copytree(self.adapter if variant.command == "init" else self.tiny, copy)
        variant.make(copy)
        done = self.warm.run(
            *self.commands(copy, name)[variant.command],
            timeout=60,
            limits={"RLIMIT_AS": ADDRESSES},
            before="hostile.variant.no_torch",
        )
        shutil.rmtree(self.folder / f"out{name}", ignore_errors=True)
        shutil.rmtree(copy)
        return done

    def fault(self, variant: Variant, done: Ended) -> str | None:
        """What is wrong with the end of a command; None if nothing is."""
        good = self.good[variant.command]
        last = (done.err.strip().splitlines() or [""])[-1]
        if not done.is_clean or done.code not in (0, 2):
            return f"ended with {done.code}: {last[:300]}"
        if done.cpu_seconds > good.cpu_seconds + SECONDS:
            return f"took {done.cpu_seconds:.1f} s of processor time"
        if done.added_bytes > good.added_bytes + BYTES or "out of memory" in last:
            return f"took {done.added_bytes / 2**30:.1f} GiB of memory"
        if variant.words is None and done.code:
            return f"is refused: {last[:300]}"
        if variant.words and (not done.code or not all(word in last for word in variant.words)):
            return f"does not say {variant.words}: {done.code} {last[:300]}"
        return None


def chosen(room: str, is_full: bool) -> list[Variant]:
    """All variants of a room, or the same few of them each time."""
    every = list(ROOMS[room].variants())
    assert len({one.name for one in every}) == len(every)
    return every if is_full else [one for one in every if zlib.crc32(one.name.encode()) % SAMPLE == 0]


@pytest.fixture(scope="module")
def bench(tiny, chats, tmp_path_factory):
    with Warm(XLA_FLAGS=os.environ["SFT_JAX_TEST_XLA_FLAGS"]) as warm:
        yield Bench(warm, tmp_path_factory.mktemp("hostile"), tiny, chats)


@pytest.mark.parametrize("room", ROOMS)
def test_hostile(bench, room, is_full):
    ends, faults = Counter(), {}
    for variant in chosen(room, is_full):
        done = bench.do(variant)
        ends["read" if done.code == 0 else "refused" if done.code == 2 else "fell"] += 1
        if fault := bench.fault(variant, done):
            faults[variant.name] = fault
    print(f"{room}: {sum(ends.values())} folders, {dict(ends)}, {len(faults)} faults")
    assert not faults, "\n".join(f"{name} {fault}" for name, fault in faults.items())
