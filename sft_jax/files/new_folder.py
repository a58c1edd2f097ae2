"""Creates the output folder of an export, on a disk or in a bucket."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from sft_jax.distributed.processes import LONG_WAIT_SECONDS, broadcast, gather, temporary_folders
from sft_jax.errors import UserError
from sft_jax.files.buckets import connect, failures, is_url, reason
from sft_jax.files.flush import flush
from sft_jax.files.lease import Lease
from sft_jax.files.lock import FolderLock
from sft_jax.files.temporary import remove_temporary, temporary_folder
from sft_jax.outside_faults import naming
from sft_jax.progress import Work

_UNFINISHED = "export.unfinished"  # marks a folder in a bucket until the export is complete
_PARTIAL = "partial-"  # in the names of temporary folders
_LAST = ("config.json", "adapter_config.json")  # a folder without one of these is not a model


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved to ``name`` when the block ends without an exception.

    On a disk, all processes share one temporary folder next to ``name``; process 0 creates it and renames it at the
    end. For a bucket, each process has its own temporary folder and uploads its files. The config file comes last, so
    that an interrupted export is not a model; the next export removes its files.

    Raises:
        UserError: ``name`` is not empty, not visible to all processes, or not writable.
    """
    with naming(name), _in_bucket(name.rstrip("/")) if is_url(name) else _on_disk(Path(name)) as folder:
        yield folder


def num_bytes(name: str) -> int:
    """The total size of the files in a folder, on a disk or in a bucket."""
    files, root = connect(name)
    return files.du(root)


@contextmanager
def _on_disk(out: Path) -> Iterator[Path]:
    _refuse_existing(out)
    gather("the export")
    is_main = jax.process_index() == 0
    name = ""
    lock = FolderLock(out.parent, f".{out.name}.lock")
    if is_main:
        name = _begin(out, lock)
    partial = Path(broadcast("the folder of the export", name))
    if is_main:
        temporary_folders.add(partial)
    try:
        if not partial.is_dir():
            raise UserError(f"{out.parent}: is not the folder of process 0; use one that all hosts share")
        yield partial
        gather("the end of the export", wait=LONG_WAIT_SECONDS)
        if is_main:
            partial.chmod(0o777 & ~_umask())  # only the owner can read temporary folders
            for file in partial.iterdir():
                file.chmod(0o666 & ~_umask())
                flush(file)
            flush(partial)
            try:
                os.replace(partial, out)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise UserError(f"{out}: another process wrote it meanwhile; use another folder") from error
                raise
            flush(out.parent)
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        temporary_folders.discard(partial)
        lock.release(remove=True)


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; use another one")


def _begin(out: Path, lock: FolderLock) -> str:
    """Creates a temporary folder next to ``out``, and removes those of writers that are dead: they held the lock.

    Raises:
        UserError: another process writes ``out``, or the folder cannot be created.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (holder := lock.take()) is not None:
            raise UserError(f"{out}: is being written by {holder}; wait for it, or use another folder")
        _refuse_existing(out)  # it may have been written since
        for dead in out.parent.glob(f".{glob.escape(out.name)}.{_PARTIAL}*"):
            shutil.rmtree(dead)
        return tempfile.mkdtemp(prefix=f".{out.name}.{_PARTIAL}", dir=out.parent)
    except UserError:
        lock.release(remove=True)
        raise
    except OSError as error:
        lock.release(remove=True)
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}; use another folder") from error


@contextmanager
def _in_bucket(url: str) -> Iterator[Path]:
    bucket, root = connect(url)
    lease = Lease(bucket, root, url)
    is_main = jax.process_index() == 0
    if is_main:
        _begin_in_bucket(bucket, root, url, lease)
    try:
        gather("the export")
        folder, lock = temporary_folder(Path(tempfile.gettempdir()), "sft-jax-export-")
        temporary_folders.add(folder)
        try:
            yield folder
            try:
                _upload(sorted(one for one in folder.iterdir() if one.name != FolderLock.NAME), bucket, root)
                if is_main:
                    lease.check()
                    bucket.rm_file(f"{root}/{_UNFINISHED}")
            except failures() as error:
                raise UserError(f"{url}: cannot be written: {reason(error)}; run the same command to retry") from error
        finally:
            temporary_folders.discard(folder)
            remove_temporary(folder, lock)
    finally:
        lease.release()


def _begin_in_bucket(bucket: Any, root: str, url: str, lease: Lease) -> None:
    """Takes the lease of a folder, marks it as unfinished, and removes what an interrupted export has left there.

    Raises:
        UserError: it exists, another process writes it, or it cannot be written.
    """
    try:
        if (holder := lease.holder()) is not None:
            raise UserError(f"{url}: is being written by {holder}; wait for it, or use another folder")
        bucket.invalidate_cache()
        if bucket.exists(f"{root}/{_UNFINISHED}"):
            bucket.rm(root, recursive=True)
        elif bucket.exists(root) and not all(one.endswith(Lease.NAME) for one in bucket.find(root)):
            raise UserError(f"{url}: already exists; use another folder, or remove it")
        if (holder := lease.take()) is not None:
            raise UserError(f"{url}: is being written by {holder}; wait for it, or use another folder")
        bucket.pipe_file(f"{root}/{_UNFINISHED}", b"")
    except failures() as error:
        lease.release()
        raise UserError(f"{url}: cannot be written: {reason(error)}") from error


def _upload(files: list[Path], bucket: Any, root: str) -> None:
    """Upload the files of this process. Process 0 uploads the config after all other processes are done."""
    size = sum(file.stat().st_size for file in files)
    with Work("uploading", size, "B") as bar:
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
