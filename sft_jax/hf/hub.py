"""Finds a model by its built-in name, local path, bucket URL or Hugging Face id."""

from __future__ import annotations

import atexit
import re
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import fsspec

from sft_jax import builtin
from sft_jax.errors import UserError
from sft_jax.files.buckets import is_url, reason
from sft_jax.files.json_object import read_bytes
from sft_jax.files.temporary import remove_temporary, temporary_folder

# Only these files are downloaded: no pickle (.bin, .pt) and no code (.py).
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*"]
_NOT = ["consolidated*"]  # a second copy of the weights under other names
_LONGEST_URL = 4096  # bytes
_POINTER = "weights.url"  # file with the URL of the weights, in a folder without weights


def find_model(path: str, revision: str | None = None, asked_by: str = "model.path", weights: bool = True) -> Path:
    """Returns a folder with ``config.json``, tokenizer and safetensors for a built-in name, path, URL or model id.

    For a URL such as ``gs://bucket/model`` it downloads everything but the weights, which are read by ranges from the
    bucket (:func:`weights_of`).

    Args:
        asked_by: the config key or file that names the model, for error messages.
        weights: whether to download the weights of a Hugging Face id.

    Raises:
        UserError: not built in, not a folder with a config.json, and not an id that can be downloaded.
    """
    if (folder := _folder_of(path, asked_by)) is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    ignored = _NOT if weights else [*_NOT, "*.safetensors"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_FILES, ignore_patterns=ignored))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{asked_by}: {path!r} is no local folder and could not be fetched: {reason}") from error


def find_config(path: str, revision: str | None = None, asked_by: str = "model.path") -> Path:
    """Like :func:`find_model`, but downloads only ``config.json`` of a Hugging Face id.

    Raises:
        UserError: as :func:`find_model`.
    """
    if (folder := _folder_of(path, asked_by)) is not None:
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{asked_by}: the config.json of {path!r} is not in the local cache and could not be downloaded; pass one "
            f"with --architecture FILE: {reason}"
        ) from error


def find_card(path: str, folder: Path) -> Path | None:
    """Returns the model card of a model; None if it has none, or none that can be fetched.

    It is not fetched with the model: offline, the Hub's client refuses a cached model that lacks a file asked for.

    Args:
        path, folder: the argument and the result of :func:`find_model`.
    """
    card = folder / "README.md"
    if card.is_file() or commit_of(folder) is None:
        return card if card.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(path, "README.md", revision=commit_of(folder)))
    except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError):
        return None


def absolute(path: str) -> str:
    """Returns the absolute path of a local model; other names are returned unchanged."""
    if path.startswith(builtin.PREFIX) or is_url(path):
        return path
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a folder in the Hugging Face cache; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def weights_of(folder: Path) -> Path | str:
    """Returns the location of the safetensors of a folder from :func:`find_model`: the folder itself, or a URL."""
    pointer = folder / _POINTER
    if not pointer.is_file():
        return folder
    try:
        return read_bytes(pointer, _LONGEST_URL).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{pointer}: is no URL of weights: {error}") from error


def _folder_of(path: str, asked_by: str) -> Path | None:
    """Returns the folder of a built-in name, URL or local path; None for a Hugging Face id."""
    if path.startswith(builtin.PREFIX):
        return builtin.locate(path, asked_by)
    if is_url(path):
        return _from_url(path, asked_by)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{asked_by}: {folder} has no config.json; it must be a Hugging Face model folder")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"{asked_by}: no folder {path!r}, and not a Hugging Face id such as Qwen/Qwen3-0.6B")
    return None


def _from_url(url: str, asked_by: str) -> Path:
    """Downloads the small files of a model in a bucket to a temporary folder, which is removed at exit."""
    folder, lock = temporary_folder(Path(tempfile.gettempdir()), "sft-jax-model-")
    atexit.register(remove_temporary, folder, lock)
    try:
        files, root = fsspec.url_to_fs(url.rstrip("/"))
        paths = {path.rpartition("/")[2]: path for path in files.find(root, maxdepth=1)}
        if "config.json" not in paths:
            raise UserError(f"{asked_by}: {url} has no config.json; it must be a Hugging Face model folder")
        for name, path in paths.items():
            if any(fnmatch(name, pattern) for pattern in _FILES) and not name.endswith(".safetensors"):
                files.get_file(path, str(folder / name))
    except (ImportError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{asked_by}: {url} cannot be read: {reason(error)}") from error
    (folder / _POINTER).write_text(url.rstrip("/"), encoding="utf-8")
    return folder
