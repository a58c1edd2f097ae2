"""Runs one input, and makes inputs from seeds by plain random changes."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sft_jax.errors import UserError

MOST_SECONDS = 10.0  # processor time of one input
MOST_BYTES = 4096  # of an input: what is wrong with a file fits into less

Function = Callable[[bytes], object]
Targets = dict[str, tuple[Function, Sequence[bytes]]]
# What bytes alone rarely become: extreme numbers, wrong kinds, brackets that nest, other encodings.
_WORDS = [b"null", b"true", b"[]", b"{}", b'""', b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"0", b"0.5"]
_WORDS += [str(10**n).encode() for n in (9, 18, 30)] + [str(2**n).encode() for n in (31, 32, 63, 64)]
_WORDS += [b"[" * 300, b'{"a":' * 300, b"\\ud800", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b",", b":", b'"']


@dataclasses.dataclass(frozen=True)
class Finding:
    """An input that ended in something else than a :class:`UserError`.

    Attributes:
        kind: the name of the exception, or what else happened.
        place: file and line of the innermost frame of the library.
    """

    kind: str
    place: str
    message: str
    data: bytes

    @property
    def key(self) -> tuple[str, str]:
        """Findings with equal keys count as one."""
        return self.kind, self.place


class TooSlow(BaseException):
    """An input takes longer than :data:`MOST_SECONDS`; no handler of the library may catch it."""


def attempt(function: Function, data: bytes) -> Finding | None:
    """Run one input; None if it is read, or refused with a :class:`UserError` of one line."""
    began = time.process_time()
    try:
        with _limited():
            function(data)
    except UserError as error:
        if "\n" in str(error):
            return Finding("several lines", _place(error), str(error), data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
        return Finding(type(error).__name__, _place(error), " ".join(str(error).split())[:300], data)
    if (seconds := time.process_time() - began) > MOST_SECONDS:
        return Finding("slow", "", f"{seconds:.1f} s", data)
    return None


def mutations(seeds: Sequence[bytes], count: int, rng: random.Random) -> Iterator[bytes]:
    """The seeds, and then ``count`` changed ones."""
    yield from seeds
    for _ in range(count):
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            data = _changed(data, seeds, rng)
        yield data[:MOST_BYTES]


def _changed(data: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    start = rng.randint(0, len(data))
    stop = min(len(data), start + rng.choice((0, 1, 1, 4, 16, 64)))
    other = rng.choice(seeds)
    first = rng.randint(0, len(other))
    put = rng.choice(
        (
            b"",
            rng.randbytes(1),
            rng.choice(_WORDS),
            data[start:stop] * 2,
            other[first : first + rng.choice((4, 32, 128))],
        )
    )
    return data[:start] + put + data[stop:]


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"more than {MOST_SECONDS:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}sft_jax{os.sep}" in frame.filename] or frames
    return f"{own[-1].filename.rpartition('sft_jax/')[2]}:{own[-1].lineno}"
