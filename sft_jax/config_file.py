"""Reading and writing a config: YAML, dotted overrides, nested dicts.

OmegaConf is used here only; everything else receives plain frozen dataclasses or the values themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_jax.config import Config
from sft_jax.config_names import of_other_tools
from sft_jax.errors import UserError


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply dotted overrides such as ``optimizer.learning_rate=2e-5``, check everything.

    Relative paths inside the file stay as they are: they are relative to the folder the command is started in.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, value out of range, missing mandatory key.
    """
    import yaml
    from omegaconf import OmegaConf

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        given = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise UserError(
            f"{path}: a config is a mapping with the keys {', '.join(f.name for f in dataclasses.fields(Config))}"
        )
    return _merged(given, overrides or [], str(path))


def from_dict(given: Mapping[str, Any], overrides: list[str] | None = None) -> Config:
    """A config from nested dicts with the keys of a file; see :func:`load`.

    Raises:
        UserError: as :func:`load`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _merged(OmegaConf.create(_escaped(dict(given))), overrides or [], "config")
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_explain(error)}") from error


def _merged(given: Any, overrides: list[str], name: str) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise UserError(f"override {override!r}: write key=value, such as optimizer.learning_rate=2e-5")
            OmegaConf.update(given, key, _parse_value(override, value), merge=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{name}: {missing[0]} is required and not set")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{name}: {_explain(error)}") from error


def _parse_value(override: str, text: str) -> Any:
    """The right side of an override, read as the YAML the config file itself is written in."""
    import yaml
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index,call-overload]
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: not valid YAML: {_one_line(error)}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, the way it is written into a run folder."""
    return dataclasses.asdict(config)


def save(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; :func:`load` reads it back to an equal object."""
    from omegaconf import OmegaConf

    written = OmegaConf.create(_escaped(to_dict(config)))  # its YAML quotes what it would read as a number
    path.write_text(OmegaConf.to_yaml(written), encoding="utf-8")


def _escaped(value: Any) -> Any:
    """With ``${`` written so that it is read as these characters and not as a reference to another key."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(one) for one in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _explain(error: Any) -> str:
    """One line for an OmegaConf error: the full key, what is wrong, and the nearest key that exists."""
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    key = getattr(error, "full_key", None) or ""
    section = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(section):
        if (told := of_other_tools(key)) is not None:
            return f"unknown key {key!r}: {told}"
        known = [f.name for f in dataclasses.fields(section)]
        close = difflib.get_close_matches(str(error.key), known, n=1)
        way_out = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key!r}; {way_out}"
    if isinstance(error, IndexError) or not isinstance(error, OmegaConfBaseException):  # data.eval.0.path=x
        at = f"{key}: " if key else ""
        return f"{at}no such entry of a list; give the list as a whole, such as 'data.eval=[{{path: heldout.jsonl}}]'"
    message = _one_line(getattr(error, "msg", None) or error)
    message = message.split(" full_key:")[0]
    return f"{key}: {message}" if key else message
