"""Storage that is told by a URL, such as ``gs://bucket/folder``."""

from __future__ import annotations

import sys
from typing import Any

import fsspec

from sft_jax.errors import UserError, one_line


def is_url(name: str) -> bool:
    """Whether a name is that of something in a bucket, and not a path."""
    return "://" in name


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        UserError: a kind of URL that is not known here, or whose package is missing.
    """
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {one_line(str(error))}") from error
    except ValueError as error:
        raise UserError(f"{url}: not a kind of address that is known here: {error}") from error


def failures() -> tuple[type[Exception], ...]:
    """What the packages that are in use raise where storage cannot be read or written, for ``except``."""
    found: list[type[Exception]] = [OSError]
    for module, name in (("gcsfs.retry", "HttpError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def reason(error: Exception) -> str:
    """What went wrong there, in one line."""
    return one_line(str(error)) or type(error).__name__
