"""A process that has imported all that a side needs, and runs one case after another."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmark.runners import RESULT
from benchmark.train import ENVIRONMENT

CASE_SECONDS = 180.0  # timeout of a case


class Server:
    """A process for the cases of one side."""

    def __init__(self, who: str, scratch: Path):
        self._who, self._log = who, scratch / f"{who}.log"
        self._start()

    def _start(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, sys.argv[0], "serve-train", self._who],
                env=ENVIRONMENT | os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True)
        self._reader.start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def __call__(self, what: str, options: dict[str, Any], seconds: float = CASE_SECONDS) -> dict[str, Any]:
        """Returns the result of a runner; ``{"error": …}`` if it fails or takes longer than ``seconds``."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + seconds
        try:
            print(json.dumps([what, options]), file=self._process.stdin, flush=True)
            while True:
                line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
                if line is None:
                    break
                if line.startswith(RESULT):
                    return json.loads(line.removeprefix(RESULT))
            log = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["process ended"]
            error = log[-1][:200]
        except queue.Empty:
            error = f"took longer than {seconds:,.0f} s"
        except BrokenPipeError:
            error = "process ended"
        self.close()
        self._start()
        return {"error": error}

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with the process of the running case, which holds the device
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
