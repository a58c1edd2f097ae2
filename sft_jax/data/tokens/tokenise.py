"""Tokenising a source: here, in several processes or on several hosts, and once only, because the result is kept.

The cache is addressed by contents: rows, template, tokenizer, options and the versions of what computes. A result is
written beside and takes its name when it is whole, so a start that is broken off leaves nothing that could be taken for
one, and two starts at once do not meet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tokenizers
import transformers

from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.folders import cache_folder, scratch_folder
from sft_jax.data.read.sources import Source
from sft_jax.data.tokens.shares import exchange_parts, share_of
from sft_jax.data.tokens.tokenised import Tokenised, Writer, read_tokenised
from sft_jax.data.tokens.workers import encode_in_processes, encode_into, options, tokenizer_digest
from sft_jax.distributed import processes
from sft_jax.errors import UserError
from sft_jax.version import __version__

_REVISION = 4  # of the encoding; raise it where the same rows give other ids or masks
_ROWS_PER_WORKER = 20_000  # fewer are done before another process has started
_MAX_WORKERS = 32
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Origin:
    """How a result came to be."""

    cached: bool
    num_workers: int  # on all hosts
    seconds: float


def tokenise(
    source: Source,
    encoder: Encoder,
    num_workers: int | None = 1,
    cache: bool = False,
    stop_at_refusal: bool = False,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[Tokenised, Origin]:
    """The rows of a source as ids and masks. All processes of a run have to ask; each encodes its share of the rows.

    Args:
        num_workers: processes on this host; None chooses by the number of rows and cores.
        cache: look for the result of an earlier start, and keep this one.
        stop_at_refusal: end at the first batch with a refused row; the result then lacks the rest, and is not kept.
        progress: called with the number of rows done since the last call.

    Raises:
        UserError: the tokenizer lacks what the rows need.
    """
    began = time.perf_counter()
    rows, is_alone = len(source), processes.count() == 1
    key = _key(source, encoder) if cache or not is_alone else ""
    kept = cache_folder() / "tokens" / key if cache else None
    found = _find(kept)
    share = share_of(key, found is not None, rows, source.name)
    if found is not None and share.is_kept:
        progress(rows)
        return found, Origin(True, 0, time.perf_counter() - began)
    if num_workers is None:
        num_workers = max(1, min(_cores(), _MAX_WORKERS, share.size // _ROWS_PER_WORKER))

    def encode(folder: Path) -> None:
        with Writer(folder, source.name) as writer:
            if num_workers == 1 or not share.size:
                encode_into(writer, source, encoder, share.start, share.stop, stop_at_refusal, progress)
            else:
                encode_in_processes(
                    writer, source, encoder, share.start, share.stop, num_workers, stop_at_refusal, progress
                )
            writer.finish()

    with _partial(kept) as folder:
        if is_alone:
            encode(folder)
        else:
            with tempfile.TemporaryDirectory(dir=folder) as work, Writer(folder, source.name) as writer:
                mine = Path(work) / "mine"
                mine.mkdir()
                encode(mine)
                for part in exchange_parts(mine, Path(work)):
                    writer.add_part(part)
                writer.finish()
            progress(rows - share.size)
        written = read_tokenised(folder)
        assert written is not None
        if kept is not None and written.num_rows == rows:
            with contextlib.suppress(FileExistsError, OSError):  # another start was quicker: the contents are the same
                os.rename(folder, kept)
            written = read_tokenised(kept) or written  # and let go of the files that are removed now
    assert written is not None
    return written, Origin(False, num_workers * processes.count(), time.perf_counter() - began)


def _find(kept: Path | None) -> Tokenised | None:
    """The result of an earlier start."""
    if kept is None or not kept.is_dir():
        return None
    found = read_tokenised(kept)
    if found is None:
        shutil.rmtree(kept, ignore_errors=True)  # damaged: made anew
    return found


@contextmanager
def _partial(kept: Path | None) -> Iterator[Path]:
    """A folder to write into; beside where the result will be kept, so that it can take its name at once."""
    if kept is None:
        folder = scratch_folder()
    else:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            for old in kept.parent.glob(".partial-*"):
                with contextlib.suppress(OSError):
                    if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                        shutil.rmtree(old)
            folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=kept.parent))
        except OSError as error:
            raise UserError(
                f"{kept.parent}: the cache cannot be written ({error.strerror}); name another folder in "
                "SFT_JAX_CACHE, or set data.cache=false"
            ) from error
    try:
        yield folder
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written: {error.strerror or error}") from error
    finally:
        if kept is not None and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays readable until it is let go


def _key(source: Source, encoder: Encoder) -> str:
    parts = {
        "rows": [source.table.digest(), len(source), source.format, source.columns, source.ignore_columns],
        "tokenizer": tokenizer_digest(encoder.tokenizer),
        "options": options(encoder),
        "versions": [_REVISION, __version__, transformers.__version__, tokenizers.__version__, jinja2.__version__],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
