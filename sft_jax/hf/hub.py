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
from sft_jax.files.hub_network import is_offline, what_is_wrong
from sft_jax.files.temporary import remove_temporary, temporary_folder
from sft_jax.progress import Work

# Only these files are downloaded: no pickle (.bin, .pt) and no code (.py).
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*"]
_NOT = ["consolidated*"]  # a second copy of the weights under other names
# Where the weights of a folder from a bucket are. Not in a file there: any model could come with such a file.
_weights_urls: dict[Path, str] = {}


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
    options = {"allow_patterns": _FILES, "ignore_patterns": ignored, "local_files_only": is_offline()}
    try:
        with Work("fetching", of=path):
            return Path(snapshot_download(path, revision=revision, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{asked_by}: {_no_folder(path)}: {what_is_wrong('model', path, error)}") from error


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
        return Path(hf_hub_download(path, "config.json", revision=revision, local_files_only=is_offline())).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{asked_by}: {_no_folder(path)}: {what_is_wrong('model', path, error)}; --architecture FILE names a "
            "config.json to use instead"
        ) from error


def is_gguf(path: Path) -> bool:
    """Whether a file is a model in the format of llama.cpp."""
    return path.suffix.lower() == ".gguf"


def _no_folder(path: str) -> str:
    """Says that a path is not there, where it looks like one, and otherwise what else it is taken for."""
    parent = Path(path).parent
    if parent.is_dir() or parent.name in ("runs", "models", "outputs", "checkpoints"):
        return f"there is no folder {path!r} here; as a model of the Hub"
    return f"{path!r} is no local folder; as a model of the Hub"


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
    return _weights_urls.get(folder, folder)


def _folder_of(path: str, asked_by: str) -> Path | None:
    """Returns the folder of a built-in name, URL or local path; None for a Hugging Face id."""
    if path.startswith(builtin.PREFIX):
        return builtin.locate(path, asked_by)
    if is_url(path):
        return _from_url(path, asked_by)
    folder = Path(path).expanduser()
    if folder.is_file():
        kind = (
            "GGUF, which is not read; use the folder of the model that it was made from"
            if is_gguf(folder)
            else "a file"
        )
        raise UserError(f"{asked_by}: {folder} is {kind}; a model is a folder with config.json and safetensors")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            gguf = next((one.name for one in folder.iterdir() if is_gguf(one)), None)
            more = "" if gguf is None else f"; {gguf} is GGUF, which is not read: use the model that it was made from"
            raise UserError(f"{asked_by}: {folder} has no config.json; it must be a Hugging Face model folder{more}")
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
    _weights_urls[folder] = url.rstrip("/")
    return folder
