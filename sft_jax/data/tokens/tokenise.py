"""Tokenizes a source, in one or several processes and on one or several hosts, and caches the result.

The cache key is a hash of rows, template, tokenizer, options and package versions. A result is written to a temporary
folder and renamed when complete, so interrupted runs leave no partial result. Of concurrent runs, one tokenizes and the
others wait for it; several hosts tokenize a part each, whatever others do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tokenizers
import transformers

from sft_jax.cores import usable_cores
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.folders import cache_folder, scratch_folder
from sft_jax.data.read.sources import Source
from sft_jax.data.tokens.shares import exchange_parts, local_row_range
from sft_jax.data.tokens.tokenised import Tokenized, Writer, read_tokenized
from sft_jax.data.tokens.workers import encode_in_processes, encode_into, options, tokenizer_digest
from sft_jax.distributed import processes
from sft_jax.errors import UserError
from sft_jax.files.lock import FolderLock
from sft_jax.files.temporary import remove_temporary, temporary_folder
from sft_jax.version import __version__

_REVISION = 5  # of the encoding and the files; increment it when the same rows give other ids, masks or files
_ROWS_PER_WORKER = 20_000  # for fewer rows, starting another process takes longer than tokenizing
_MAX_WORKERS = 32
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Origin:
    """How a result was obtained."""

    cached: bool
    num_workers: int  # processes on all hosts
    seconds: float


def tokenise(
    source: Source,
    encoder: Encoder,
    num_workers: int | None = 1,
    cache: bool = False,
    stop_at_refusal: bool = False,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[Tokenized, Origin]:
    """Tokenize a source. A collective: all processes of a run have to call it, and each encodes a range of the rows.

    Args:
        num_workers: processes on this host; None chooses by the number of rows and cores.
        cache: whether to read the result from the cache, and to store it there.
        stop_at_refusal: whether to stop after the first batch with a refused row; a partial result is not cached.
        progress: called with the number of rows done since the last call.

    Raises:
        UserError: the tokenizer has no chat template or no EOS token, and the rows need one.
    """
    is_alone = processes.count() == 1
    key = _key(source, encoder) if cache or not is_alone else ""
    cached_at = cache_folder() / "tokens" / key if cache else None
    cached = _read_cached(cached_at)
    with _only_one(cached_at if is_alone and cached is None else None, source.name) as has_waited:
        if has_waited:
            cached = _read_cached(cached_at)
        return _tokenise(source, encoder, num_workers, key, cached_at, cached, stop_at_refusal, progress)


def _tokenise(
    source: Source,
    encoder: Encoder,
    num_workers: int | None,
    key: str,
    cached_at: Path | None,
    cached: Tokenized | None,
    stop_at_refusal: bool,
    progress: Callable[[int], object],
) -> tuple[Tokenized, Origin]:
    """See :func:`tokenise`; ``cached_at`` is the folder in the cache, ``cached`` what it holds."""
    began = time.perf_counter()
    num_rows, is_alone = len(source), processes.count() == 1
    local = local_row_range(key, cached is not None, num_rows, source.name)
    if cached is not None and local.is_cached:
        progress(num_rows)
        return cached, Origin(True, 0, time.perf_counter() - began)
    if num_workers is None:
        num_workers = max(1, min(usable_cores(), _MAX_WORKERS, local.size // _ROWS_PER_WORKER))

    def encode(folder: Path) -> None:
        with Writer(folder, source.name) as writer:
            if num_workers == 1 or not local.size:
                encode_into(writer, source, encoder, local.start, local.stop, stop_at_refusal, progress)
            else:
                encode_in_processes(
                    writer, source, encoder, local.start, local.stop, num_workers, stop_at_refusal, progress
                )
            writer.finish()

    with _partial(cached_at) as folder:
        if is_alone:
            encode(folder)
        else:
            with tempfile.TemporaryDirectory(dir=folder) as work, Writer(folder, source.name) as writer:
                part_of_process = Path(work) / "local"
                part_of_process.mkdir()
                encode(part_of_process)
                for part in exchange_parts(part_of_process, Path(work)):
                    writer.add_part(part)
                writer.finish()
            progress(num_rows - local.size)
        written = read_tokenized(folder)
        assert written is not None
        if cached_at is not None and written.num_rows == num_rows:
            with contextlib.suppress(FileExistsError, OSError):  # another run was faster; the contents are the same
                (folder / FolderLock.NAME).unlink(missing_ok=True)
                os.rename(folder, cached_at)
            written = read_tokenized(cached_at) or written  # unmaps the files of the temporary folder
    assert written is not None
    return written, Origin(False, num_workers * processes.count(), time.perf_counter() - began)


def _read_cached(cached_at: Path | None) -> Tokenized | None:
    """Read a result from the cache; deletes it if it is not what was written, and says so."""
    if cached_at is None or not cached_at.is_dir():
        return None
    cached = read_tokenized(cached_at, verify=True)
    if cached is None:
        print(f"sft-jax: {cached_at}: the cached tokens are damaged and are made again", file=sys.stderr, flush=True)
        shutil.rmtree(cached_at, ignore_errors=True)
    return cached


@contextmanager
def _only_one(cached_at: Path | None, name: str) -> Iterator[bool]:
    """Wait while another process tokenizes the same rows for the same cache.

    Yields whether it waited.
    """
    if cached_at is None:
        yield False
        return
    with _writing_cache(cached_at):
        cached_at.parent.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(cached_at.parent, f".{cached_at.name}.lock")
        has_waited = False
        while (holder := lock.take()) is not None:
            if not has_waited:
                print(f"sft-jax: {name}: is being tokenized by {holder}; waiting for its result", file=sys.stderr)
            has_waited = True
            time.sleep(_POLL_SECONDS)
    try:
        yield has_waited
    finally:
        lock.release(remove=True)


@contextmanager
def _writing_cache(cached_at: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{cached_at.parent}: the cache cannot be written ({error.strerror}); set another folder in "
            "SFT_JAX_CACHE, or set data.cache=false"
        ) from error


@contextmanager
def _partial(cached_at: Path | None) -> Iterator[Path]:
    """Create a temporary folder, in the same directory as ``cached_at`` so that it can be renamed atomically."""
    lock = None
    if cached_at is None:
        folder = scratch_folder()
    else:
        with _writing_cache(cached_at):
            cached_at.parent.mkdir(parents=True, exist_ok=True)
            folder, lock = temporary_folder(cached_at.parent, ".partial-")
    try:
        yield folder
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written: {error.strerror or error}") from error
    finally:
        if lock is not None:
            remove_temporary(folder, lock)  # memory-mapped files stay readable until they are unmapped


def _key(source: Source, encoder: Encoder) -> str:
    parts = {
        "rows": [source.table.digest(), len(source), source.format, source.columns, source.ignore_columns],
        **({"is_held_out": True} if source.is_held_out else {}),
        "tokenizer": tokenizer_digest(encoder.tokenizer),
        "options": options(encoder),
        "versions": [_REVISION, __version__, transformers.__version__, tokenizers.__version__, jinja2.__version__],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()
