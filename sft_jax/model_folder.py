"""The folder that an export makes, on a disk or in a bucket: it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sft_jax.buckets import connect, is_url, reason
from sft_jax.errors import UserError
from sft_jax.processes import gather, of_first

_LAST = ("config.json", "adapter_config.json")  # without one of these a folder is not a model


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """A folder to write into, whose files ``name`` has when the block ends; nothing is left if anything fails before.

    On a disk all processes get the same folder, beside ``name``, which process 0 makes and gives its name at the end.
    For a bucket each gets a temporary one of its own, whose files it sends; the config, which makes a model of them,
    comes last.

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
    try:
        if not partial.is_dir():
            raise UserError(f"{out.parent}: is not the folder that process 0 sees; all need the same one")
        yield partial
        gather("the end of the export")
        if is_main:
            partial.chmod(0o777 & ~_umask())  # temporary folders are made for the owner alone
            for file in partial.iterdir():
                file.chmod(0o666 & ~_umask())
            os.replace(partial, out)
    except BaseException:
        if is_main:
            shutil.rmtree(partial)
        raise


@contextmanager
def _in_bucket(url: str) -> Iterator[Path]:
    bucket, root = connect(url)
    try:
        is_taken = bucket.exists(root)
    except OSError as error:
        raise UserError(f"{url}: cannot be looked at: {reason(error)}") from error
    if is_taken:
        raise UserError(f"{url}: is there already; name another folder, or remove it")
    gather("the export")
    with tempfile.TemporaryDirectory(prefix="sft-jax-export-") as folder:
        yield Path(folder)
        _send(sorted(Path(folder).iterdir()), bucket, root, url)


def _send(files: list[Path], bucket: Any, root: str, url: str) -> None:
    sent: list[str] = []
    size = sum(file.stat().st_size for file in files)
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc="sending", leave=False, disable=None) as bar:

            def send(file: Path) -> None:
                sent.append(f"{root}/{file.name}")
                bucket.put_file(str(file), sent[-1])
                bar.update(file.stat().st_size)

            for file in files:
                if file.name not in _LAST:
                    send(file)
            gather("the end of the export")
            for file in files:
                if file.name in _LAST:
                    send(file)
    except BaseException as error:
        for path in sent:
            with suppress(OSError):
                bucket.rm_file(path)
        if isinstance(error, OSError):
            raise UserError(f"{url}: cannot be written: {reason(error)}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
