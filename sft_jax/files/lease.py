"""A lease on a folder in a bucket, which has no locks: the holder writes a heartbeat, and others watch for it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from datetime import datetime
from typing import Any

from sft_jax.errors import UserError
from sft_jax.files.buckets import failures, reason

BEAT_SECONDS = 5.0
SILENT_BEATS = 4  # a holder that is silent for so many beats is dead
SETTLE_SECONDS = 1.0  # a claim holds if it is still there after this time


class Lease:
    """At most one process holds the lease of a folder; one that dies loses it after :data:`SILENT_BEATS` beats.

    Of two processes that claim it at the same time, the one that wrote last has it. A holder whose lease was taken
    over, because it could not write for so long, finds out at its next beat.

    Args:
        bucket: an fsspec file system.
        root: path of the folder.
        name: of the folder, for messages.
    """

    NAME = ".lease"

    def __init__(self, bucket: Any, root: str, name: str):
        self._bucket, self._path, self._name = bucket, f"{root}/{self.NAME}", name
        self._mine: dict[str, Any] | None = None
        self._lost_to: str | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def holder(self) -> str | None:
        """Returns who holds the lease; None if nobody does, or this object. Waits for a heartbeat if somebody may."""
        first = self._read()
        if first is None or self._is_mine(first):
            return None
        seconds = SILENT_BEATS * BEAT_SECONDS
        print(
            f"sft-jax: {self._name}: was in use by {_described(first)}; waiting up to {seconds:.0f} s for a sign that "
            "it still is",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)
            now = self._read()
            if now is None:
                return None
            if now != first:
                return _described(now)
        return None

    def take(self) -> str | None:
        """Takes the lease and begins to write heartbeats; returns who else has taken it just now, if somebody has.

        Call :meth:`holder` first.

        Raises:
            UserError: the bucket cannot be written.
        """
        if self._mine is not None:
            return None
        self._mine = {
            "id": uuid.uuid4().hex,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(" ", "seconds"),
            "beat": 0,
        }
        try:
            self._write()
            time.sleep(SETTLE_SECONDS)
            now = self._read()
        except failures() as error:
            self._mine = None
            raise UserError(f"{self._name}: cannot be written: {reason(error)}") from error
        if now is None or not self._is_mine(now):
            self._mine = None
            return "another process" if now is None else _described(now)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return None

    def check(self) -> None:
        """Checks that no other process has taken the lease over.

        Raises:
            UserError: one has.
        """
        if self._lost_to is not None:
            raise UserError(f"{self._name}: was taken over by {self._lost_to}; this process stops")

    def release(self) -> None:
        """Ends the heartbeats, and gives the lease up, if this object holds it."""
        if self._mine is None:
            return
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(*failures()):  # it ends by itself too
            now = self._read()
            if now is not None and self._is_mine(now):
                self._bucket.rm_file(self._path)
        self._mine = None

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(*failures()):  # the next beat may get through
                now = self._read()
                if now is not None and not self._is_mine(now):
                    self._lost_to = _described(now)
                    return
                assert self._mine is not None
                self._mine["beat"] += 1
                self._write()

    def _is_mine(self, lease: dict[str, Any]) -> bool:
        return self._mine is not None and lease.get("id") == self._mine["id"]

    def _write(self) -> None:
        self._bucket.pipe_file(self._path, json.dumps(self._mine).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            lease = json.loads(self._bucket.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return lease if isinstance(lease, dict) else {}


def _described(lease: dict[str, Any]) -> str:
    if {"process", "host", "since"} <= lease.keys():
        return f"process {lease['process']} on {lease['host']}, since {lease['since']}"
    return "another process"
