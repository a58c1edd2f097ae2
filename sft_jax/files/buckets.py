"""Access to storage by URL, such as ``gs://bucket/folder``."""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any

import fsspec

from sft_jax.errors import UserError, one_line


def is_url(name: str) -> bool:
    """Whether ``name`` is a URL and not a local path."""
    return "://" in name


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        UserError: an unknown URL protocol, or one whose package is not installed.
    """
    _leave_out_repeated_errors()
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {one_line(str(error))}") from error
    except ValueError as error:
        raise UserError(f"{url}: unknown URL protocol: {error}") from error


@cache
def _leave_out_repeated_errors() -> None:
    """Keeps the package of Google's buckets from also logging, with tracebacks, the errors that it raises."""
    logging.getLogger("gcsfs").addFilter(lambda one: not one.exc_info)


def failures() -> tuple[type[Exception], ...]:
    """The exceptions that the loaded storage packages raise on failed reads and writes, for ``except``."""
    exceptions: list[type[Exception]] = [OSError]
    for module, name in (("gcsfs.retry", "HttpError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            exceptions.append(getattr(sys.modules[module], name))
    return tuple(exceptions)


def reason(error: Exception) -> str:
    """The message of a storage error, in one line."""
    return one_line(str(error)) or type(error).__name__
