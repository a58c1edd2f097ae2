"""Names the file when a library that reads it fails on what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sft_jax.errors import UserError

_LONGEST = 300  # characters of a reason


def reason(error: BaseException) -> str:
    """The message of an exception in one line, with its kind where the message alone says little."""
    text = " ".join(str(error).split())[:_LONGEST]
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else text


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever a library raises in this block into a :class:`UserError` that starts with ``what``.

    Libraries answer wrong content with exceptions of any kind: of ``Exception`` itself, of the code that trips over a
    wrong type, and of panics in Rust, which do not derive from ``Exception``. Use it around a call of a library
    that reads a file, and around nothing else.

    Raises:
        UserError: see above.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{what}: {reason(error)}") from error
        raise
