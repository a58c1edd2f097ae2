"""Distributes tokenization over the processes of a run: each tokenizes a range of rows and receives the others.

Batches are drawn from all examples, so every process needs all of them on its disk, but reads and encodes only its own
range of rows.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from sft_jax.data.tokens.tokenised import FILES
from sft_jax.distributed import processes
from sft_jax.errors import UserError

_ROUND_BYTES = 16 * 2**20  # total over all processes; each device holds all of them in a round


class RowRange(NamedTuple):
    """Rows ``start … stop`` of a source, which this process tokenizes."""

    start: int
    stop: int
    is_cached: bool  # whether all processes have the result in their cache

    @property
    def size(self) -> int:
        """The number of rows."""
        return self.stop - self.start


def local_row_range(key: str, is_cached: bool, num_rows: int, name: str) -> RowRange:
    """Return the rows of a source that this process tokenizes. A collective: all processes have to call it.

    Args:
        key: hash of rows, tokenizer, options and versions.
        is_cached: whether this process has the whole result in its cache.

    Raises:
        UserError: the keys of the processes differ.
    """
    values = processes.gather("the rows", json.dumps([key, is_cached]), processes.LONG_WAIT_SECONDS)
    states = [json.loads(value) for value in values]
    for i, (other_key, _) in enumerate(states):
        if other_key != states[0][0]:
            raise UserError(
                f"{name}: process {i} does not have the rows, tokenizer and package versions of process 0; they must "
                "be the same on every host"
            )
    index, count = processes.index(), len(states)
    return RowRange(index * num_rows // count, (index + 1) * num_rows // count, all(cached for _, cached in states))


def exchange_parts(local: Path, into: Path) -> list[Path]:
    """Exchange the tokenized parts of all processes. A collective: all processes have to call it.

    Args:
        local: folder that a :class:`~sft_jax.data.tokens.tokenised.Writer` of this process has written.
        into: folder for the parts of the other processes.

    Returns:
        The folders of all parts, in the order of their rows.
    """
    processes.gather("the tokens", wait=processes.LONG_WAIT_SECONDS)
    index, count = processes.index(), processes.count()
    parts = [local if i == index else into / f"process{i}" for i in range(count)]
    for i, part in enumerate(parts):
        if i != index:
            part.mkdir()
    for name in FILES:
        with ExitStack() as opened:
            own = opened.enter_context((local / name).open("rb"))
            others = {i: opened.enter_context((parts[i] / name).open("wb")) for i in range(count) if i != index}
            while any(chunks := processes.exchange(own.read(max(1, _ROUND_BYTES // count)))):
                for i, file in others.items():
                    file.write(chunks[i])
    return parts
