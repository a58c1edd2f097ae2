"""Tokenising a source: in this process or in several, and once only, because the result is kept.

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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers

from sft_jax import __version__
from sft_jax.data.chat import Encoder
from sft_jax.data.sources import Source
from sft_jax.data.tables import open_file
from sft_jax.data.tokenised import Tokenised, Writer, read_tokenised
from sft_jax.errors import UserError

_REVISION = 1  # of the encoding; raise it where the same rows give other ids or masks
_BATCH = 1000  # rows at a time
_ROWS_PER_WORKER = 20_000  # fewer are done before another process has started
_MAX_WORKERS = 32
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Origin:
    """How a result came to be."""

    cached: bool
    num_workers: int
    seconds: float


def tokenise(
    source: Source,
    encoder: Encoder,
    num_workers: int | None = 1,
    cache: bool = False,
    stop_at_refusal: bool = False,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[Tokenised, Origin]:
    """The rows of a source as ids and masks.

    Args:
        num_workers: processes; None chooses by the number of rows and cores.
        cache: look for the result of an earlier start, and keep this one.
        stop_at_refusal: end at the first batch with a refused row; the result then lacks the rest, and is not kept.
        progress: called with the number of rows done since the last call.

    Raises:
        UserError: the tokenizer lacks what the rows need.
    """
    began = time.perf_counter()
    rows = len(source)
    kept = cache_folder() / "tokens" / _key(source, encoder) if cache else None
    if kept is not None and kept.is_dir():
        found = read_tokenised(kept)
        if found is not None:
            progress(rows)
            return found, Origin(True, 0, time.perf_counter() - began)
        shutil.rmtree(kept, ignore_errors=True)  # damaged: made anew
    if num_workers is None:
        num_workers = max(1, min(_cores(), _MAX_WORKERS, rows // _ROWS_PER_WORKER))
    with _partial(kept) as folder:
        with Writer(folder) as writer:
            if num_workers == 1:
                _encode_into(writer, source, encoder, 0, rows, stop_at_refusal, progress)
            else:
                _encode_in_processes(writer, source, encoder, num_workers, stop_at_refusal, progress)
            writer.finish()
        is_whole = writer.num_rows == rows
        if kept is not None and is_whole:
            with contextlib.suppress(FileExistsError, OSError):  # another start was quicker: the contents are the same
                os.rename(folder, kept)
                folder = kept
        found = read_tokenised(folder)
    assert found is not None
    return found, Origin(False, num_workers, time.perf_counter() - began)


def cache_folder() -> Path:
    """``$SFT_JAX_CACHE``, or ``sft-jax`` in the user's cache folder."""
    given = os.environ.get("SFT_JAX_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sft-jax"


@contextmanager
def _partial(kept: Path | None) -> Iterator[Path]:
    """A folder to write into; beside where the result will be kept, so that it can take its name at once."""
    if kept is None:
        folder = Path(tempfile.mkdtemp(dir=_scratch()))
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
            shutil.rmtree(folder)  # what is mapped stays readable until it is let go


_temporary: list[tempfile.TemporaryDirectory] = []


def _scratch() -> str:
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="sft-jax-"))
    return _temporary[0].name


def _encode_into(
    writer: Writer,
    source: Source,
    encoder: Encoder,
    start: int,
    stop: int,
    stop_at_refusal: bool,
    progress: Callable[[int], object],
) -> None:
    before = encoder.tally
    encoder.tally = writer.tally
    try:
        for first in range(start, stop, _BATCH):
            rows = list(source.read(first, min(first + _BATCH, stop), encoder.keep_reasoning))
            writer.add(encoder.encode(rows), first)
            progress(len(rows))
            if stop_at_refusal and writer.num_refused:
                break
    finally:
        encoder.tally = before


# -- several processes ------------------------------------------------------------------------------------------------
# Started as commands of their own, not forked (jax has threads) and not by multiprocessing (which would run the main
# module of whoever calls train once more). They are told what to do in a JSON file and write their part into a folder.


def _encode_in_processes(
    writer: Writer,
    source: Source,
    encoder: Encoder,
    num_workers: int,
    stop_at_refusal: bool,
    progress: Callable[[int], object],
) -> None:
    path = getattr(source.table, "path", None)
    if path is None:  # a dataset without a file of its own: written into one
        path = Path(tempfile.mkdtemp(dir=_scratch())) / "rows.parquet"
        source.table.write(path)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(dir=writer.folder) as name:
        work = Path(name)
        encoder.tokenizer.save_pretrained(work / "tokenizer")
        edges = [round(i * len(source) / num_workers) for i in range(num_workers + 1)]
        parts = []
        for i, (start, stop) in enumerate(pairwise(edges)):
            part = work / f"part{i}"
            part.mkdir()
            job = {
                "path": str(path),
                "name": source.name,
                "format": source.format,
                "columns": source.columns,
                "start": start,
                "stop": stop,
                "stop_at_refusal": stop_at_refusal,
                "tokenizer": str(work / "tokenizer"),
                "tokenizer_digest": _tokenizer_digest(encoder.tokenizer),
                "encoder": _options(encoder),
                "out": str(part),
            }
            (work / f"job{i}.json").write_text(json.dumps(job), encoding="utf-8")
            parts.append(part)
        _run_all([work / f"job{i}.json" for i in range(num_workers)], progress)
        for part in parts:
            writer.add_part(part)


def _run_all(jobs: list[Path], progress: Callable[[int], object]) -> None:
    """Run a worker a job, add up what they say they have done, and let none of them outlive this."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "sft_jax.data.tokenise"]
    workers = [
        subprocess.Popen(
            [*command, str(job)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for job in jobs
    ]
    errors = [""] * len(workers)
    lock = threading.Lock()

    def listen(worker: subprocess.Popen) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            with lock:
                progress(int(line))

    def collect(i: int) -> None:
        stderr = workers[i].stderr
        assert stderr is not None
        errors[i] = stderr.read()

    threads = [threading.Thread(target=listen, args=(worker,), daemon=True) for worker in workers]
    threads += [threading.Thread(target=collect, args=(i,), daemon=True) for i in range(len(workers))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker, error in zip(workers, errors, strict=True):
            if worker.wait() == 2:
                raise UserError(error.strip().splitlines()[-1])
            if worker.returncode:
                raise RuntimeError(f"a process that tokenises ended with {worker.returncode}:\n{error}")
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            for pipe in (worker.stdout, worker.stderr):
                if pipe is not None:
                    pipe.close()


def _work(job: dict[str, Any]) -> None:
    """What a worker does."""
    # AutoTokenizer would look for the class of the model first, which takes longer than all else here
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(job["tokenizer"], local_files_only=True)
    assert _tokenizer_digest(tokenizer) == job["tokenizer_digest"], "the tokenizer has changed by being saved"
    encoder = Encoder(tokenizer, **job["encoder"])
    table = open_file(Path(job["path"]), job["name"])
    source = Source(job["name"], table, job["format"], max_rows=job["stop"], columns=job["columns"])
    with Writer(Path(job["out"])) as writer:
        _encode_into(
            writer,
            source,
            encoder,
            job["start"],
            job["stop"],
            job["stop_at_refusal"],
            lambda rows: print(rows, flush=True),
        )
        writer.finish()


# -- what a result depends on -----------------------------------------------------------------------------------------


def _key(source: Source, encoder: Encoder) -> str:
    parts = {
        "rows": [source.table.digest(), len(source), source.format, source.columns],
        "tokenizer": _tokenizer_digest(encoder.tokenizer),
        "options": _options(encoder),
        "versions": [_REVISION, __version__, transformers.__version__, tokenizers.__version__, jinja2.__version__],
    }
    if "strftime_now" in (encoder.tokenizer.chat_template or ""):
        parts["date"] = date.today().isoformat()
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).hexdigest()


def _options(encoder: Encoder) -> dict[str, Any]:
    return {
        "train_on": encoder.train_on,
        "stop_token": encoder.stop_token,
        "stop_ids": sorted(encoder.stop_ids),
        "keep_reasoning": encoder.keep_reasoning,
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    text = "\0".join([backend.to_str(), special, str(tokenizer.chat_template)])
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    try:
        _work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
