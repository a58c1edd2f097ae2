"""Where a model lives: in this package, in a local folder, or under a Hugging Face id, fetched into the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from sft_jax import builtin
from sft_jax.errors import UserError

# No pickle (.bin, .pt), no code (.py): what is not named here is not downloaded.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*"]


def find_model(path: str, revision: str | None = None, asked_by: str = "model.path") -> Path:
    """The folder with ``config.json``, tokenizer and safetensors of a built-in name, local path or Hugging Face id.

    Args:
        asked_by: the config key or file that names the model, for error messages.

    Raises:
        UserError: neither built in, nor a folder with a config.json, nor an id that can be fetched.
    """
    if path.startswith(builtin.PREFIX):
        return builtin.locate(path, asked_by)
    if (folder := _local_folder(path, asked_by)) is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{asked_by}: {path!r} is no local folder and could not be fetched: {reason}") from error


def find_config(path: str, revision: str | None = None, asked_by: str = "model.path") -> Path:
    """A folder as :func:`find_model` finds it, of which only ``config.json`` has to be there; no more is fetched.

    Raises:
        UserError: as :func:`find_model`.
    """
    if path.startswith(builtin.PREFIX):
        return builtin.locate(path, asked_by)
    if (folder := _local_folder(path, asked_by)) is not None:
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{asked_by}: the config.json of {path!r} is not in the local cache and could not be fetched, so give one "
            f"with --architecture FILE: {reason}"
        ) from error


def _local_folder(path: str, asked_by: str) -> Path | None:
    """The folder of a local path; None for a Hugging Face id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{asked_by}: {folder} has no config.json; it must be a Hugging Face model folder")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"{asked_by}: no folder {path!r}, and not a Hugging Face id such as Qwen/Qwen3-0.6B")
    return None
