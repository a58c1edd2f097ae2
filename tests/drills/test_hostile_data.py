"""Hostile data and configs: a command reads them rightly, or ends in one line that says what is wrong.

With ``--full`` every input runs, and ``pytest -s`` prints the figures; else a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import hostile_arrow
import hostile_configs
import hostile_places
import hostile_text
import pytest
from warm import Ended, Warm

from sft_jax import config_file

_CPU_SECONDS = 10.0
_BYTES = 1 << 30  # of memory, beyond the size of the file
_MOST_BYTES = 6 << 30  # at which a command is stopped, for the sake of the machine
_NUM_MUTATIONS = 60  # of each seed, at full size


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with Warm(SFT_JAX_CACHE=str(cache), TOKENIZERS_PARALLELISM="false") as one:
        yield one


def complaint(ended: Ended, size: int) -> str | None:
    """What is wrong with how a command ended; None if nothing is."""
    last = (ended.err.strip().splitlines() or [""])[-1]
    if not ended.is_clean or ended.code not in (0, 2):
        return f"code {ended.code}: {last[:300]}"
    if ended.cpu_seconds > _CPU_SECONDS:
        return f"{ended.cpu_seconds:.0f} CPU seconds; {last[:100]}"
    if ended.added_bytes > _BYTES + size:
        return f"{ended.added_bytes >> 20} MB for a file of {size >> 20} MB; {last[:100]}"
    return None


class Drill:
    """Runs inputs, and collects what falls."""

    def __init__(self, warm: Warm, tiny: Path, folder: Path, is_full: bool):
        self._warm, self._tiny, self._folder = warm, tiny, folder
        self._is_full, self._step = is_full, 1
        self._count = 0
        self.codes: Counter[int] = Counter()
        self.fallen: list[str] = []
        self.slowest, self.largest = (0.0, ""), (0, "")

    def sample(self, step: int) -> None:
        """Run one input of ``step``, unless at full size."""
        self._step = 1 if self._is_full else step

    def is_next(self) -> bool:
        """Whether the next input belongs to the sample."""
        self._count += 1
        return (self._count - 1) % self._step == 0

    def run(self, name: str, config: Path, size: int, *overrides: str, command: str = "inspect") -> None:
        """Run a command with a config."""
        ended = self._warm.run(
            command, config, *overrides, timeout=40, limits={"RLIMIT_CORE": 0, "RLIMIT_DATA": _MOST_BYTES}
        )
        self.codes[ended.code] += 1
        self.slowest = max(self.slowest, (round(ended.cpu_seconds, 1), name))
        self.largest = max(self.largest, (ended.added_bytes >> 20, name))
        if (problem := complaint(ended, size)) is not None:
            self.fallen.append(f"{name}: {problem}")
            print(self.fallen[-1], flush=True)

    def config(self, path: Path | str) -> Path:
        """A config whose data are at a path."""
        target = self._folder / "config.yaml"
        run = {
            "model": {"path": str(self._tiny), "dtype": "float32"},
            "data": {"train": [{"path": "a.jsonl"}], "max_length": 128},
            "training": {"output_dir": str(self._folder / "run"), "max_steps": 1, "batch_size": 2},
        }
        config_file.save(config_file.from_dict(run), target)
        lines = target.read_text().replace("path: a.jsonl", f"path: {_quoted(str(path))}")
        target.write_bytes(lines.encode(errors="surrogateescape"))
        return target

    def files(self, named: Iterable[tuple[str, bytes]], *overrides: str) -> None:
        """Inspect each file."""
        for name, content in named:
            if self.is_next():
                path = self._folder / name
                path.write_bytes(content)
                self.run(name, self.config(path), len(content), *overrides)
                path.unlink()

    def check(self) -> None:
        """Print the figures, and fail if anything fell."""
        print(
            f"\n{sum(self.codes.values())} inputs, codes {dict(self.codes)}, {len(self.fallen)} fell; at most "
            f"{self.slowest[0]} CPU seconds ({self.slowest[1]}), {self.largest[0]} MB ({self.largest[1]})"
        )
        assert self.codes, "nothing ran"
        assert not self.fallen, "\n".join(self.fallen)


def _quoted(text: str) -> str:
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text)
    return f'"{escaped}"'


@pytest.fixture
def drill(warm, tiny, tmp_path, is_full):
    return Drill(warm, tiny, tmp_path, is_full)


@pytest.mark.drill("sft_jax/data", "sft_jax/config_file.py", "sft_jax/config")
class TestHostileData:
    def test_text(self, drill):
        drill.sample(16)
        drill.files(hostile_text.texts())
        drill.check()

    def test_wrong_values(self, drill):
        drill.sample(80)
        drill.files(hostile_text.wrong_values(), "data.on_bad_row=skip")
        drill.files(hostile_text.single_values())
        drill.check()

    def test_archives(self, drill):
        drill.sample(7)
        drill.files(hostile_text.archives())
        drill.check()

    def test_arrow(self, drill):
        drill.sample(9)
        drill.files(hostile_arrow.built())
        drill.check()

    def test_mutations(self, drill):
        drill.sample(120)
        num = _NUM_MUTATIONS
        seeds = hostile_arrow.seeds() | {"a.jsonl": hostile_text.LINES, "a.csv": hostile_text.TABLE}
        for name, content in seeds.items():
            drill.files(hostile_text.mutated(name, content, num))
        drill.check()

    def test_places(self, drill, tmp_path):
        drill.sample(10)
        for n, (name, build) in enumerate(hostile_places.places().items()):
            if drill.is_next():
                (tmp_path / str(n)).mkdir()
                drill.run(name, drill.config(build(tmp_path / str(n))), 0)
        drill.check()

    def test_configs(self, drill, tiny, chats, tmp_path):
        drill.sample(160)
        paths = str(tiny), str(chats), str(tmp_path)
        good = tmp_path / "good.yaml"
        good.write_bytes(hostile_configs.filled(b"{good}", *paths))
        for name, overrides in hostile_configs.overrides():
            if drill.is_next():
                drill.run(name, good, 0, *(one.replace("{data}", str(chats)) for one in overrides))
        for name, content in hostile_configs.files():
            if drill.is_next():
                path = tmp_path / "hostile.yaml"
                path.write_bytes(hostile_configs.filled(content, *paths))
                drill.run(name, path, len(content))
        drill.check()

    def test_train(self, drill, tmp_path):
        """Training reads what inspection reads; a few files of each kind."""
        drill.sample(6)
        some = [*hostile_text.texts()][::16] + [*hostile_arrow.built()][::8] + [*hostile_text.archives()][::8]
        for name, content in some:
            if drill.is_next():
                (tmp_path / name).write_bytes(content)
                drill.run(f"train {name}", drill.config(tmp_path / name), len(content), command="train")
        drill.check()


def test_the_limit_of_memory_is_seen():
    """A command that holds more than it should is a complaint."""
    assert "MB for a file" in str(complaint(Ended(0, "", "", 1.0, 3 << 30), 1 << 30))
    assert complaint(Ended(2, "", "sft-jax: a.jsonl: has no rows\n", 1.0, 0), 0) is None
    assert complaint(Ended(70, "", "sft-jax: an error\n", 1.0, 0), 0) is not None
