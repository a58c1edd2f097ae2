"""The folder of a run: on a disk, or in a bucket with its small files kept here while the command runs."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from etils import epath

from sft_jax.errors import UserError
from sft_jax.files.buckets import connect, failures, is_url, reason


class RunFolder:
    """Where a run is kept.

    Files of a run on a disk are written in place. Of one in a bucket, such as ``gs://bucket/runs/a``, checkpoints are
    written and read there by all processes; everything else is written into a temporary folder, and :meth:`push` copies
    what has changed.

    Args:
        name: a path or a URL.

    Raises:
        UserError: a kind of URL that is not known here, or one that cannot be read.
    """

    def __init__(self, name: str):
        self.name = name.rstrip("/")
        self._fs: Any = None
        self._pushed: dict[Path, tuple[int, int]] = {}
        if not is_url(name):
            self.local = Path(name).expanduser()
            return
        self._fs, self._root = connect(self.name)
        self.local = Path(tempfile.mkdtemp(prefix="sft-jax-run-"))
        weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)
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
        """Whether it is one that training writes into."""
        return (self.local / "config.yaml").is_file() and self.checkpoints.is_dir()

    def check(self) -> None:
        """Refuse to write into a folder that holds something else than a run.

        Raises:
            UserError: it does, or it cannot be written.
        """
        if self._fs is None:
            _probe(self.local)
        empty = not self.local.is_dir() or not any(self.local.iterdir())
        if self._fs is not None and empty:
            empty = not self._fs.exists(self._root) or not self._fs.ls(self._root)
        if not empty and not ((self.local / "tokenizer").is_dir() or self.checkpoints.is_dir()):
            raise UserError(f"training.output_dir: {self} holds something that is not a run; name another folder")

    def begins(self) -> None:
        """Make the folder, where it is a disk's."""
        self.local.mkdir(parents=True, exist_ok=True)

    def is_shared(self) -> bool:
        """Whether what process 0 wrote is seen here."""
        if self._fs is None:
            return (self.local / "config.yaml").is_file()
        self._fs.invalidate_cache()
        return self._fs.isfile(f"{self._root}/config.yaml")

    def push(self, last: bool = False) -> None:
        """Copy files that have changed to the bucket; does nothing for a folder on a disk.

        What cannot be copied is said, and tried again the next time.

        Raises:
            UserError: it is the ``last`` time.
        """
        if self._fs is None:
            return
        for file in sorted(self.local.rglob("*")):
            if not file.is_file():
                continue
            seen = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._pushed.get(file) == seen:
                continue
            to = f"{self._root}/{file.relative_to(self.local).as_posix()}"
            try:
                self._fs.put_file(str(file), to)
            except failures() as error:
                problem = f"{to}: could not be written: {reason(error)}"
                if last:
                    raise UserError(f"{problem}; the checkpoints are in {self.checkpoints}") from error
                print(f"sft-jax: {problem}; it is tried again later", file=sys.stderr, flush=True)
                continue
            self._pushed[file] = seen

    def _pull(self) -> None:
        if not self._fs.exists(f"{self._root}/config.yaml"):  # no run: a model, perhaps, whose weights are large
            return
        for path in self._fs.find(self._root):
            name = path.removeprefix(self._root).lstrip("/")
            if name.startswith("checkpoints/"):
                continue
            file = self.local / name
            file.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(path, str(file))
            self._pushed[file] = (file.stat().st_mtime_ns, file.stat().st_size)


def _probe(folder: Path) -> None:
    """Find out whether a folder, or the one that it will be made in, can be written; nothing is left there.

    Raises:
        UserError: it cannot, or is a file.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"training.output_dir: {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise UserError(f"training.output_dir: {there} cannot be written: {error.strerror or error}") from error
