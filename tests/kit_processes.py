"""Helpers that start other processes: commands with their own environment, and runs of several processes."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def child_environment(**changes: str) -> dict[str, str]:
    """Environment of a child process: one CPU device and the fast compiler flags of the tests."""
    flags = os.environ["SFT_JAX_TEST_XLA_FLAGS"]
    return os.environ | {"XLA_FLAGS": flags, "PYTHONWARNINGS": "default"} | changes


def process(*arguments: object, timeout: float = 300, **changes: str) -> subprocess.CompletedProcess:
    """Run the command line in a new process; ``changes`` are changes of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "sft_jax", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=child_environment(**changes), check=False,
    )  # fmt: skip


class Child:
    """A process with its own environment that runs several commands one after another."""

    _TIMEOUT = 300  # seconds per command
    _PROGRAM = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from sft_jax.without_torch import leave_out_torch
leave_out_torch()
from sft_jax.cli import main
for line in sys.stdin:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""

    def __init__(self, **changes: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment(**changes),
        )  # fmt: skip

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps([*map(str, arguments)]), file=stdin, flush=True)
        limit = threading.Timer(self._TIMEOUT, self._process.kill)
        limit.start()
        try:
            answer = stdout.readline()
        finally:
            limit.cancel()
        assert answer, f"the process ended with {self._process.wait()} during {arguments}"
        return subprocess.CompletedProcess(arguments, *json.loads(answer))

    def close(self) -> None:
        self._process.communicate(timeout=60)


class Group:
    """The processes of one run, all on this machine."""

    def __init__(self, count: int, *arguments: object, python: str | None = None):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        environment = child_environment(PYTHONUNBUFFERED="1")
        start = ["-m", "sft_jax"] if python is None else ["-c", python]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *start, *map(str, arguments), "--coordinator", f"127.0.0.1:{port}",
                 "--num-processes", str(count), "--process-id", str(i)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for i in range(count)
        ]  # fmt: skip
        self.stderr = [""] * count
        self._readers = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(count)]
        for reader in self._readers:
            reader.start()

    def _read(self, i: int) -> None:
        stream = self.processes[i].stderr
        assert stream is not None
        for line in stream:
            self.stderr[i] += line

    def wait(self, timeout: float = 240) -> list[int]:
        """Wait for all processes; returns their exit codes. Kills them after ``timeout``."""
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        for reader in self._readers:
            reader.join()
        for process in self.processes:
            process.communicate()
        return codes

    def wait_for(self, run: Path, step: int, timeout: float = 240) -> None:
        """Wait until a step is in ``metrics.jsonl``."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            if len(losses(run) if (run / "metrics.jsonl").is_file() else []) >= step:
                return
            time.sleep(0.05)
        self.wait(1)
        pytest.fail(f"step {step} was never reached: {self.stderr}")
