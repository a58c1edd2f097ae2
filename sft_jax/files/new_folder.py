"""The folder that an export makes, on a disk or in a bucket: it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sft_jax.distributed.processes import LONG_WAIT_SECONDS, gather, of_first, passing
from sft_jax.errors import UserError
from sft_jax.files.buckets import connect, failures, is_url, reason

_UNFINISHED = "export.unfinished"  # is in a bucket's folder until an export is done
_LAST = ("config.json", "adapter_config.json")  # without one of these a folder is not a model


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """A folder to write into, whose files ``name`` has when the block ends, and no model if anything fails before.

    On a disk all processes get the same folder, beside ``name``, which process 0 makes and gives its name at the end.
    For a bucket each gets a temporary one of its own, whose files it sends; the config, which makes a model of them,
    comes last, and what an export has left there that was broken off is removed by the next.

    Raises:
        UserError: ``name`` holds something, is not seen by all processes, or cannot be written.
    """
    with _in_bucket(name.rstrip("/")) if is_url(name) else _on_disk(Path(name)) as folder:
        yield folder


def num_bytes(name: str) -> int:
    """The size of all files of a folder, on a disk or in a bucket."""
    files, root = connect(name)
    return files.du(root)


@contextmanager
def _on_disk(out: Path) -> Iterator[Path]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; name another one")
    gather("the export")
    is_main = jax.process_index() == 0
    name = ""
    if is_main:
        out.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
    partial = Path(of_first("the export's folder", name))
    if is_main:
        passing.add(partial)
    try:
        if not partial.is_dir():
            raise UserError(f"{out.parent}: is not the folder that process 0 sees; all need the same one")
        yield partial
        gather("the end of the export", wait=LONG_WAIT_SECONDS)
        if is_main:
            partial.chmod(0o777 & ~_umask())  # temporary folders are made for the owner alone
            for file in partial.iterdir():
                file.chmod(0o666 & ~_umask())
            os.replace(partial, out)
    except BaseException:
        if is_main:
            shutil.rmtree(partial)
        raise
    finally:
        passing.discard(partial)


@contextmanager
def _in_bucket(url: str) -> Iterator[Path]:
    bucket, root = connect(url)
    mark = f"{root}/{_UNFINISHED}"
    is_main = jax.process_index() == 0
    try:
        if is_main:
            if bucket.exists(mark):  # left by an export that was broken off
                bucket.rm(root, recursive=True)
            elif bucket.exists(root):
                raise UserError(f"{url}: is there already; name another folder, or remove it")
            bucket.pipe_file(mark, b"")
    except failures() as error:
        raise UserError(f"{url}: cannot be written: {reason(error)}") from error
    gather("the export")
    folder = Path(tempfile.mkdtemp(prefix="sft-jax-export-"))
    passing.add(folder)
    try:
        yield folder
        try:
            _send(sorted(folder.iterdir()), bucket, root)
            if is_main:
                bucket.rm_file(mark)
        except failures() as error:
            raise UserError(f"{url}: cannot be written: {reason(error)}; the same command tries it again") from error
    finally:
        passing.discard(folder)
        shutil.rmtree(folder)


def _send(files: list[Path], bucket: Any, root: str) -> None:
    """All files of this process; process 0 sends what makes a model of them when the others have sent theirs."""
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="sending", leave=False, disable=None) as bar:
        for is_last in (False, True):
            for file in files:
                if (file.name in _LAST) == is_last:
                    bucket.put_file(str(file), f"{root}/{file.name}")
                    bar.update(file.stat().st_size)
            if not is_last:
                gather("the end of the export", wait=LONG_WAIT_SECONDS)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
