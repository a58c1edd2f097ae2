"""Commands in processes of their own that start within milliseconds, for drills that need hundreds of them.

One process imports everything once, and forks for each command before jax has started a backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
        cpu_seconds: processor time of it and of the children that it waited for.
        added_bytes: the peak of its resident memory, less that of a command that does nothing.
    """

    code: int
    out: str
    err: str
    cpu_seconds: float
    added_bytes: int

    @property
    def is_clean(self) -> bool:
        """Whether it ended with a documented exit code, and if with an error, in one line without a traceback."""
        if self.code == 0:
            return "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1:]
        return (
            self.code in (1, 2, 75) and "Traceback" not in self.err and bool(last) and last[0].startswith("sft-jax: ")
        )


class Life:
    """A command that runs."""

    def __init__(self, warm: Warm, pid: int, folder: Path):
        self._warm = warm
        self._folder = folder
        self.pid = pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the command and, as a terminal does, to the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def is_running(self, timeout: float = 0) -> bool:
        """Whether it still runs after at most ``timeout`` seconds."""
        self._warm.poll(timeout)
        return self.pid not in self._warm.ended

    def wait(self, timeout: float = 120) -> Ended:
        """Wait for its end; a command that takes longer than ``timeout`` seconds is killed, which its code tells.

        Its errors then end with what its threads were doing.
        """
        deadline = time.monotonic() + timeout
        while self.is_running(0.05):
            if time.monotonic() > deadline:
                self.kill(signal.SIGUSR1)
                if self.is_running(1):
                    self.kill()
        code, cpu, peak = self._warm.ended.pop(self.pid)
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(code, out, err, cpu, max(0, peak - self._warm.idle_bytes))


class Warm:
    """Starts commands.

    Args:
        environment: changes of the environment of all commands.
    """

    def __init__(self, **environment: str):
        self._folder = tempfile.TemporaryDirectory(prefix="sft-jax-drill-")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent,
            env=os.environ | environment,
        )
        self._count = 0
        self.ended: dict[int, tuple[int, float, int]] = {}
        self._started: list[int] = []
        self._unread = b""
        self.idle_bytes = 0
        self.run("--help")
        self.idle_bytes = self.run("--help").added_bytes

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate(timeout=30)
        self._folder.cleanup()

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        limits: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
        before: str = "",
    ) -> Life:
        """Start a command.

        Args:
            arguments: of ``sft-jax``.
            limits: limits of the process by their name in :mod:`resource`, such as ``{"RLIMIT_FSIZE": 4096}``.
            environment: changes of its environment.
            before: a function that runs first in the command's process, as ``module.function``; of this folder.
        """
        folder = Path(self._folder.name, str(self._count))
        folder.mkdir()
        self._count += 1
        order = {
            "arguments": [*map(str, arguments)],
            "cwd": str(cwd or folder),
            "folder": str(folder),
            "limits": dict(limits or {}),
            "environment": dict(environment or {}),
            "before": before,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        while not self._started:
            self.poll(1)
        return Life(self, self._started.pop(), folder)

    def run(self, *arguments: object, timeout: float = 120, **options: Any) -> Ended:
        """Run a command to its end; the options are those of :meth:`start`."""
        return self.start(*arguments, **options).wait(timeout)

    def poll(self, timeout: float = 0) -> None:
        """Read what the server says, for at most ``timeout`` seconds."""
        stdout = self._server.stdout
        assert stdout is not None
        while select.select([stdout], [], [], timeout)[0]:
            content = os.read(stdout.fileno(), 65536)
            assert content, f"the process that starts commands ended with {self._server.wait()}"
            *lines, self._unread = (self._unread + content).split(b"\n")
            for line in lines:
                match json.loads(line):
                    case {"started": pid}:
                        self._started.append(pid)
                    case {"ended": pid, "code": code, "cpu": cpu, "peak": peak}:
                        self.ended[pid] = code, cpu, peak
            timeout = 0


def _import_everything() -> None:
    import sft_jax

    for name in ("datasets", "pyarrow.parquet", "transformers.models.auto.tokenization_auto"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(sft_jax.__path__, "sft_jax."):
        with contextlib.suppress(ImportError):  # what needs torch, or a GPU
            importlib.import_module(module.name)


def _child(order: dict[str, Any], writers: list[int]) -> None:
    """Run a command in this process, which was forked for it, and end it as Python would.

    Args:
        writers: the pipes for its output and errors.
    """
    from sft_jax import __main__

    os.setpgid(0, 0)
    os.chdir(order["cwd"])
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(writers[0], 1)
    os.dup2(writers[1], 2)
    os.environ.update(order["environment"])
    for name, limit in order["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    faulthandler.register(signal.SIGUSR1, file=2)
    sys.argv = ["sft-jax", *order["arguments"]]
    if before := order["before"]:
        module, _, name = before.rpartition(".")
        getattr(importlib.import_module(module), name)()
    sys.exit(__main__.run())


def _say(**what: int | float) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


@dataclasses.dataclass
class _Pipe:
    """What a command writes; a file would fall under the limits of its process."""

    reader: int
    file: Path

    def read(self) -> None:
        with self.file.open("ab") as file, contextlib.suppress(BlockingIOError):
            while content := os.read(self.reader, 65536):
                file.write(content)


def _fork(order: dict[str, Any], pipes: dict[int, list[_Pipe]]) -> None:
    ends = [os.pipe() for _ in range(2)]
    if not (pid := os.fork()):
        _child(order, [writer for _, writer in ends])
    for reader, writer in ends:
        os.close(writer)
        os.set_blocking(reader, False)
    pipes[pid] = [
        _Pipe(reader, Path(order["folder"], name)) for (reader, _), name in zip(ends, ("out", "err"), strict=True)
    ]
    _say(started=pid)


def _serve() -> None:
    from sft_jax.without_torch import leave_out_torch

    leave_out_torch()
    _import_everything()
    unread = b""
    is_open = True
    pipes: dict[int, list[_Pipe]] = {}
    while is_open or pipes:
        readers = [pipe.reader for both in pipes.values() for pipe in both]
        ready = select.select([0] * is_open + readers, [], [], 0.002)[0]
        if 0 in ready:
            content = os.read(0, 65536)
            is_open = bool(content)
            *lines, unread = (unread + content).split(b"\n")
            for line in lines:
                _fork(json.loads(line), pipes)
        for pipe in [one for both in pipes.values() for one in both if one.reader in ready]:
            pipe.read()
        while pipes and (ended := os.wait4(-1, os.WNOHANG))[0]:
            pid, status, usage = ended
            for pipe in pipes.pop(pid):
                pipe.read()
                os.close(pipe.reader)
            cpu = usage.ru_utime + usage.ru_stime
            _say(ended=pid, code=os.waitstatus_to_exitcode(status), cpu=cpu, peak=usage.ru_maxrss * 1024)


if __name__ == "__main__":
    _serve()
