"""Encodes a range of rows, in this process or in worker processes.

Workers are started as commands: JAX is multithreaded, so forking is unsafe, and ``multiprocessing`` would run the main
module of the caller again. Each worker reads its job from a JSON file and writes its part to a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers

from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.folders import scratch_folder
from sft_jax.data.read.limits import BATCH_BYTES
from sft_jax.data.read.rows import Row, RowError
from sft_jax.data.read.sources import Source
from sft_jax.data.read.tables import open_file
from sft_jax.data.tokens.tokenised import Writer
from sft_jax.errors import UserError
from sft_jax.files.orphans import end_with_parent

_BATCH = 1000  # rows that are encoded at a time


def encode_into(
    writer: Writer,
    source: Source,
    encoder: Encoder,
    start: int,
    stop: int,
    stop_at_refusal: bool,
    progress: Callable[[int], object],
) -> None:
    """Encode rows ``start … stop`` of a source in this process.

    Args:
        stop_at_refusal: whether to stop after the first batch with a refused row.
        progress: called with the number of rows done since the last call.
    """
    before = encoder.tally
    encoder.tally = writer.tally
    try:
        for rows in _batches(source, start, stop, encoder.keep_reasoning):
            writer.add(encoder.encode(rows), start + writer.num_rows)
            progress(len(rows))
            if stop_at_refusal and writer.num_refused:
                break
    finally:
        encoder.tally = before


def _batches(source: Source, start: int, stop: int, keep_reasoning: bool) -> Iterator[list[Row | RowError]]:
    """Yield rows ``start … stop``; as many at a time as are quick to encode together and fit in memory."""
    for first in range(start, stop, _BATCH):
        rows, size = list[Row | RowError](), 0
        for row in source.read(first, min(first + _BATCH, stop), keep_reasoning):
            more = 0 if isinstance(row, RowError) else row.num_bytes
            if rows and size + more > BATCH_BYTES:
                yield rows
                rows, size = [], 0
            rows.append(row)
            size += more
        if rows:
            yield rows


def encode_in_processes(
    writer: Writer,
    source: Source,
    encoder: Encoder,
    start: int,
    stop: int,
    num_workers: int,
    stop_at_refusal: bool,
    progress: Callable[[int], object],
) -> None:
    """Encode rows ``start … stop`` of a source in worker processes; the result is the same as in one process.

    Raises:
        UserError: a worker ended with a user error.
    """
    path = getattr(source.table, "path", None)
    if path is None:  # write a data set to a file
        path = scratch_folder() / "rows.parquet"
        source.table.write(path)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(dir=writer.folder) as name:
        work = Path(name)
        encoder.tokenizer.save_pretrained(work / "tokenizer")
        edges = [start + i * (stop - start) // num_workers for i in range(num_workers + 1)]
        parts = []
        for i, (first, last) in enumerate(pairwise(edges)):
            part = work / f"part{i}"
            part.mkdir()
            job = {
                "path": str(path),
                "name": source.name,
                "format": source.format,
                "columns": source.columns,
                "ignore_columns": source.ignore_columns,
                "is_held_out": source.is_held_out,
                "start": first,
                "stop": last,
                "stop_at_refusal": stop_at_refusal,
                "tokenizer": str(work / "tokenizer"),
                "tokenizer_digest": tokenizer_digest(encoder.tokenizer),
                "encoder": options(encoder),
                "out": str(part),
            }
            (work / f"job{i}.json").write_text(json.dumps(job), encoding="utf-8")
            parts.append(part)
        _run_all([work / f"job{i}.json" for i in range(num_workers)], source.name, progress)
        for part in parts:
            writer.add_part(part)


def _run_all(jobs: list[Path], name: str, progress: Callable[[int], object]) -> None:
    """Run a worker for each job, report their progress, and stop all of them on return."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "sft_jax.data.tokens.workers"]
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
            if worker.returncode < 0:
                raise UserError(
                    f"{name}: a process that tokenizes was ended by signal {-worker.returncode}, perhaps for lack of "
                    "memory; set fewer data.num_workers"
                )
            if worker.returncode:
                raise RuntimeError(f"a tokenization worker ended with exit code {worker.returncode}:\n{error}")
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            for pipe in (worker.stdout, worker.stderr):
                if pipe is not None:
                    pipe.close()


def _work(job: dict[str, Any]) -> None:
    """Run the job of a worker."""
    # AutoTokenizer would first look up the model class, which is the slowest step
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(job["tokenizer"], local_files_only=True)
    assert tokenizer_digest(tokenizer) == job["tokenizer_digest"], "saving the tokenizer has changed it"
    encoder = Encoder(tokenizer, **job["encoder"])
    table = open_file(Path(job["path"]), job["name"])
    source = Source(
        job["name"], table, job["format"], max_rows=job["stop"], columns=job["columns"],
        ignore_columns=tuple(job["ignore_columns"]), is_held_out=job["is_held_out"],
    )  # fmt: skip
    with Writer(Path(job["out"]), job["name"]) as writer:
        encode_into(
            writer,
            source,
            encoder,
            job["start"],
            job["stop"],
            job["stop_at_refusal"],
            lambda rows: print(rows, flush=True),
        )
        writer.finish()


def options(encoder: Encoder) -> dict[str, Any]:
    """Return the arguments of an encoder, except its tokenizer, as JSON values."""
    return {
        "train_on": encoder.train_on,
        "stop_token": encoder.stop_token,
        "stop_ids": sorted(encoder.stop_ids),
        "keep_reasoning": encoder.keep_reasoning,
        "today": encoder.today,
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of a tokenizer: vocabulary, settings, special tokens and chat template."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    text = "\0".join([backend.to_str(), special, str(tokenizer.chat_template)])
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


if __name__ == "__main__":
    end_with_parent()
    try:
        _work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
