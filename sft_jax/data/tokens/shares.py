"""Tokenising split between the processes of a run: each does its share of the rows and gets the others' from them.

Batches are drawn from all examples, so that every process needs all of them on its disk; but none reads and encodes
more rows than its share.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from sft_jax.data.tokens.tokenised import FILES
from sft_jax.distributed import processes
from sft_jax.errors import UserError

_ROUND_BYTES = 16 * 2**20  # of all processes together, that each device holds at a time


class Share(NamedTuple):
    """Rows ``start … stop`` are this process's."""

    start: int
    stop: int
    is_kept: bool  # by all processes, from an earlier start

    @property
    def size(self) -> int:
        """How many rows."""
        return self.stop - self.start


def share_of(key: str, is_kept: bool, num_rows: int, name: str) -> Share:
    """Which rows of a source are whose; all processes have to ask.

    Args:
        key: of the result: rows, tokenizer, options and versions.
        is_kept: whether this process has the whole result already.

    Raises:
        UserError: processes that do not see the same.
    """
    mine = json.dumps([key, is_kept])
    said = [json.loads(one) for one in processes.gather("the rows", mine, processes.LONG_WAIT_SECONDS)]
    for i, (theirs, _) in enumerate(said):
        if theirs != said[0][0]:
            raise UserError(
                f"{name}: process {i} does not have the rows, tokenizer and package versions of process 0; every host "
                "needs the same"
            )
    me, count = processes.index(), len(said)
    return Share(me * num_rows // count, (me + 1) * num_rows // count, all(theirs for _, theirs in said))


def exchange_parts(mine: Path, into: Path) -> list[Path]:
    """The parts of all processes, in the order of their rows, as folders; all processes have to ask.

    Args:
        mine: what a :class:`~sft_jax.data.tokens.tokenised.Writer` has written here.
        into: where the others' parts are written.
    """
    processes.gather("the tokens", wait=processes.LONG_WAIT_SECONDS)
    me, count = processes.index(), processes.count()
    parts = [mine if i == me else into / f"process{i}" for i in range(count)]
    for i, part in enumerate(parts):
        if i != me:
            part.mkdir()
    for name in FILES:
        with ExitStack() as opened:
            own = opened.enter_context((mine / name).open("rb"))
            others = {i: opened.enter_context((parts[i] / name).open("wb")) for i in range(count) if i != me}
            while any(pieces := processes.exchange(own.read(max(1, _ROUND_BYTES // count)))):
                for i, file in others.items():
                    file.write(pieces[i])
    return parts
