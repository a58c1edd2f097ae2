"""The run directory, on a disk or in a bucket."""

from __future__ import annotations

import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from etils import epath

from sft_jax.errors import UserError
from sft_jax.files.buckets import connect, failures, is_url, reason
from sft_jax.files.lease import Lease
from sft_jax.files.lock import FolderLock
from sft_jax.files.temporary import remove_temporary, temporary_folder


class RunDirectory:
    """A run directory.

    On a disk, all files are written in place. In a bucket, such as ``gs://bucket/runs/a``, all processes read and write
    checkpoints directly; the other files are in a temporary folder, and :meth:`push` uploads those that have changed.

    Args:
        name: a path or a URL.

    Raises:
        UserError: an unknown URL protocol, or a URL that cannot be read.
    """

    def __init__(self, name: str):
        self.name = name.rstrip("/")
        self._fs: Any = None
        self._pushed: dict[Path, tuple[int, int]] = {}
        if not is_url(name):
            self.local = Path(name).expanduser()
            self._lock: FolderLock | Lease = FolderLock(self.local)
            return
        self._fs, self._root = connect(self.name)
        self._lock = Lease(self._fs, self._root, self.name)
        self.local, self._local_lock = temporary_folder(Path(tempfile.gettempdir()), "sft-jax-run-")
        weakref.finalize(self, remove_temporary, self.local, self._local_lock)
        try:
            self._pull()
        except failures() as error:
            raise UserError(f"{name}: cannot be read: {reason(error)}") from error

    def __str__(self) -> str:
        return self.name

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the checkpoints."""
        return epath.Path(self.name if self._fs is not None else self.local.absolute()) / "checkpoints"

    def is_run(self) -> bool:
        """Whether the directory holds a run."""
        return (self.local / "config.yaml").is_file() and self.checkpoints.is_dir()

    def check(self) -> None:
        """Check that the directory is writable, and that it is empty or holds a run.

        Raises:
            UserError: it holds other files, or it cannot be written.
        """
        if self._fs is None:
            _probe(self.local)
        empty = not self.local.is_dir() or all(one.name == FolderLock.NAME for one in self.local.iterdir())
        if self._fs is not None and empty:
            names = self._fs.ls(self._root, detail=False) if self._fs.exists(self._root) else []
            empty = all(name.endswith(f"/{Lease.NAME}") for name in names)
        if not empty and not ((self.local / "tokenizer").is_dir() or self.checkpoints.is_dir()):
            raise UserError(f"training.output_dir: {self} holds files that are not a run; use another directory")

    def check_free(self) -> None:
        """Check that no other process trains in the directory; in a bucket, this may wait for its heartbeat.

        Raises:
            UserError: it is in use, or cannot be read.
        """
        try:
            self._refuse(self._lock.holder())
        except failures() as error:
            raise UserError(f"{self}: cannot be read: {reason(error)}") from error

    def holder(self) -> str | None:
        """The process that trains in the directory; None if none does, or if that is unknown, as in a bucket."""
        return self._lock.holder() if isinstance(self._lock, FolderLock) else None

    def check_held(self) -> None:
        """Check, in a bucket, that no other process has begun to train in the directory.

        Raises:
            UserError: one has, because this one was silent for long.
        """
        if isinstance(self._lock, Lease):
            self._lock.check()

    def create(self) -> None:
        """Create the local directory, and keep other processes from training in it until :meth:`release`.

        Raises:
            UserError: another process trains in it.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        self._refuse(self._lock.take())

    def release(self) -> None:
        """Let other processes train in the directory."""
        self._lock.release()

    def _refuse(self, holder: str | None) -> None:
        if holder is not None:
            raise UserError(
                f"training.output_dir: {self} is in use by {holder}; wait for it or stop it, or use another directory"
            )

    def is_shared(self) -> bool:
        """Whether this process sees the files that process 0 wrote."""
        if self._fs is None:
            return (self.local / "config.yaml").is_file()
        self._fs.invalidate_cache()
        return self._fs.isfile(f"{self._root}/config.yaml")

    def push(self, last: bool = False) -> None:
        """Upload files that have changed to the bucket; does nothing for a directory on a disk.

        Failed uploads are printed, and the next call tries them again.

        Raises:
            UserError: an upload failed and ``last`` is True.
        """
        if self._fs is None:
            return
        for file in sorted(self.local.rglob("*")):
            if not file.is_file() or file.name == FolderLock.NAME:
                continue
            version = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._pushed.get(file) == version:
                continue
            target = f"{self._root}/{file.relative_to(self.local).as_posix()}"
            try:
                self._fs.put_file(str(file), target)
            except failures() as error:
                problem = f"{target}: could not be written: {reason(error)}"
                if last:
                    raise UserError(f"{problem}; the checkpoints are in {self.checkpoints}") from error
                print(f"sft-jax: {problem}; it will be retried later", file=sys.stderr, flush=True)
                continue
            self._pushed[file] = version

    def _pull(self) -> None:
        if not self._fs.exists(f"{self._root}/config.yaml"):  # not a run; it may be a model with large weights
            return
        for path in self._fs.find(self._root):
            name = path.removeprefix(self._root).lstrip("/")
            if name.startswith("checkpoints/") or name == Lease.NAME:
                continue
            file = self.local / name
            file.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(path, str(file))
            self._pushed[file] = (file.stat().st_mtime_ns, file.stat().st_size)


def _probe(folder: Path) -> None:
    """Check that a folder, or its closest existing parent, is writable; leaves no files.

    Raises:
        UserError: it is not writable, or it is a file.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"training.output_dir: {existing} is a file")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise UserError(f"training.output_dir: {existing} cannot be written: {error.strerror or error}") from error
