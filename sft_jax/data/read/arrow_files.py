"""Parquet and Arrow files, and data sets of ``datasets``, as tables. Another process reads them.

:mod:`sft_jax.data.read.arrow_process` says why. One such process serves all files; it starts with the first of
them, and ends with this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from sft_jax.data.read.arrow_rows import arrow_rows
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.text_files import file_digest
from sft_jax.errors import UserError

_COMMAND = [sys.executable, "-m", "sft_jax.data.read.arrow_process"]
_WHAT = {"parquet": "as parquet", "arrow": "as arrow", "saved": "as a saved dataset", "hub": "as a dataset"}
_BATCH = 1000  # rows that are asked for at a time


class ArrowTable:
    """The rows of a file or a data set that the other process reads.

    Args:
        name: for error messages.
        kind: ``parquet``, ``arrow``, ``saved`` or ``hub``.
        options: of data sets: ``split``, ``name`` and ``revision``.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str | Path, name: str, kind: str, options: dict[str, str | None] | None = None):
        self._name, self._kind = name, kind
        if kind in ("parquet", "arrow"):
            self.path = Path(path)
        size = 0 if kind == "hub" else sum(one.stat().st_size for one in _files(Path(path)))
        self._request = {"kind": kind, "path": str(path), "options": options or {}, "size": size}
        opened, _ = self._ask("open")
        self._num_rows, self._columns, self._digest = opened["rows"], opened["columns"], opened["digest"]

    def __len__(self) -> int:
        return self._num_rows

    @property
    def is_dataset(self) -> bool:
        """Whether ``datasets`` reads it."""
        return self._kind in ("saved", "hub")

    def columns(self) -> list[str]:
        """Return the columns of the schema."""
        return self._columns

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
        """Yield rows ``start … stop``, without the nulls that Arrow adds for keys of other rows."""
        import pyarrow as pa

        stop = min(stop, len(self))
        while start < stop:
            num_rows = min(stop - start, _BATCH)
            reply, stream = self._ask("read", row=start, num_rows=num_rows)
            if num_rows == reply["rows"] == _BATCH and start + _BATCH < len(self):
                after = {"row": start + _BATCH, "num_rows": min(len(self) - start - _BATCH, _BATCH)}
                _reader.prepare(self._request | {"what": "read"} | after)
            rows = arrow_rows(pa.ipc.open_stream(stream).read_all())
            for i in range(reply["rows"]):
                reason = reply["bad"].get(str(i))
                yield next(rows) if reason is None else RowError(reason)
            start += reply["rows"]

    def digest(self) -> str:
        """Return a hash of the file's bytes, or the fingerprint of a data set."""
        return self._digest or file_digest(self.path)

    def write(self, path: Path) -> None:
        """Write all rows of a data set to a Parquet file, for other processes."""
        self._ask("write", to=str(path))

    def _ask(self, what: str, **more: Any) -> tuple[dict[str, Any], bytes]:
        try:
            reply, stream = _reader.ask(self._request | {"what": what} | more)
        except _Ended as ended:
            raise UserError(
                f"{self._name}: cannot be read {_WHAT[self._kind]}: its reader {ended}; the file is damaged, or was "
                "changed while it was read; write it again"
            ) from ended
        if "error" in reply:
            raise UserError(f"{self._name}: cannot be read {_WHAT[self._kind]}: {reply['error']}")
        return reply, stream


def _files(path: Path) -> list[Path]:
    return [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]


class _Ended(Exception):
    """The other process has ended; the message says how."""


class _Reader:
    """The other process. Starts with the first request, and again after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self._prepared: dict[str, Any] | None = None  # a request whose reply was not read yet

    def start(self) -> None:
        """Start the process, which takes a moment."""
        with self._lock:
            self._start()

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Send a request, and return the reply.

        Raises:
            _Ended: the process ends before it has replied.
        """
        with self._lock:
            prepared, self._prepared = self._prepared, None
            try:
                if prepared is not None and prepared != request:
                    self._receive()
                if prepared != request:
                    self._send(request)
                return self._receive()
            except (
                BaseException
            ):  # such as Ctrl-C: a reply that was not read would be taken for that of the next request
                self._stop()
                raise

    def prepare(self, request: dict[str, Any]) -> None:
        """Send a request that is likely to be asked next."""
        with self._lock:
            if self._prepared is None:
                self._send(request)
                self._prepared = request

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # other memory pools reserve more than they use, which the limit of memory would count
            environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                _COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment
            )
        return self._process

    def _send(self, request: dict[str, Any]) -> None:
        stdin = self._start().stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what has ended does not reply, which is noticed
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        stdout = self._start().stdout
        assert stdout is not None
        line = stdout.readline()
        reply = json.loads(line) if line.endswith(b"\n") else {"bytes": 1}
        stream = stdout.read(reply["bytes"])
        if len(stream) < reply["bytes"]:
            raise _Ended(_described(self._stop()))
        return reply, stream

    def _stop(self) -> int:
        process, self._process, self._prepared = self._process, None, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            return process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _described(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "took too long"
    return f"crashed (signal {-code})" if code < 0 else f"ended with exit code {code}"


_reader = _Reader()
atexit.register(_reader.close)


def start_reader() -> None:
    """Start the other process ahead of the first file."""
    _reader.start()
