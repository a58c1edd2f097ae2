"""Locates what comes with the package: a tiny pretrained model, data sets about its world, configs, architectures."""

from __future__ import annotations

from pathlib import Path

from sft_jax.errors import UserError

PREFIX = "builtin:"
_FOLDER = Path(__file__).parent


def locate(name: str, asked_by: str) -> Path:
    """Returns the path of a name such as ``builtin:tiny`` or ``builtin:countries/train.jsonl``.

    Args:
        asked_by: the config key or file with the name, for the error message.

    Raises:
        UserError: unknown name; the message lists the known ones.
    """
    known = {"tiny": _FOLDER / "tiny"}
    known |= {f"countries/{file.name}": file for file in sorted((_FOLDER / "countries").glob("*.jsonl"))}
    known["chatml.jinja"] = configs() / "chatml.jinja"
    path = known.get(name.removeprefix(PREFIX))
    if path is None:
        raise UserError(f"{asked_by}: {name!r} is not built in; there are {', '.join(PREFIX + key for key in known)}")
    return path


def configs() -> Path:
    """The folder of the configs: inside the package where it is installed, beside it in a clone."""
    installed = _FOLDER / "configs"
    return installed if installed.is_dir() else _FOLDER.parents[1] / "configs"


def config(name: str) -> Path:
    """Returns the path of a config such as ``builtin:quickstart`` or a recipe.

    Raises:
        UserError: unknown name.
    """
    key = name.removeprefix(PREFIX).removesuffix(".yaml")
    for path in (configs() / f"{key}.yaml", configs() / "recipes" / f"{key}.yaml"):
        if "/" not in key and path.is_file():
            return path
    raise UserError(
        f"{name}: no such built-in config; there are {PREFIX}quickstart and those that sft-jax recipes lists"
    )


def architecture(model: str) -> Path | None:
    """Returns the ``config.json`` of a model of the Hub such as ``meta-llama/Llama-3.1-8B-Instruct``, None if absent.

    Instruction-tuned models share the file of their base.
    """
    name = model.rpartition("/")[2].lower().replace("-instruct", "")
    path = configs() / "architectures" / f"{name}.json"
    return path if path.is_file() else None
