"""Reads and writes a config: YAML, dotted overrides, nested dicts.

Only this module uses OmegaConf; all others receive frozen dataclasses or plain values.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_jax import builtin
from sft_jax.config import Config
from sft_jax.config_names import SECTIONS, suggest_key
from sft_jax.config_yaml import BYTES, check_yaml
from sft_jax.errors import UserError
from sft_jax.redaction import has_secret, secret_names

_SOURCES = ("data.train", "data.eval", "evaluation.documents")  # lists of sources; a path stands for a source


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply dotted overrides such as ``optimizer.learning_rate=2e-5``, and check all values.

    ``builtin:quickstart`` and the names of recipes are files that come with the package; a run directory stands for its
    ``config.yaml``, with the directory as ``training.output_dir``. Relative paths inside the file are relative to the
    current working directory.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, value out of range, missing required key.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = builtin.config(str(path)) if str(path).startswith(builtin.PREFIX) else Path(path)
    if (path / "config.yaml").is_file():
        overrides = [f"training.output_dir={json.dumps(str(path))}", *(overrides or [])]
        path = path / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such config file{_begin_hint(path)}")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(BYTES + 1)
        check_yaml(text, str(path))
        values = OmegaConf.load(io.StringIO(text))
    except UserError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(values):
        raise UserError(
            f"{path}: a config is a mapping with the keys {', '.join(f.name for f in dataclasses.fields(Config))}"
        )
    return _merged(values, overrides or [], str(path))


def _begin_hint(path: Path) -> str:
    """What the name of a missing config file may stand for."""
    recipe = builtin.configs() / "recipes" / f"{path.stem}.yaml"
    if path.stem == "quickstart" or recipe.is_file():
        return f"; the one that comes with the package is {builtin.PREFIX}{path.stem}"
    return ""


def from_dict(values: Mapping[str, Any], overrides: list[str] | None = None) -> Config:
    """A config from nested dicts with the same keys as a file; see :func:`load`.

    Raises:
        UserError: as :func:`load`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _merged(OmegaConf.create(_escaped(dict(values))), overrides or [], "config")
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_explain(error)}") from error


def _merged(values: Any, overrides: list[str], name: str) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        _check_lora(overrides)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
                raise UserError(f"override {override!r}: write key=value, such as optimizer.learning_rate=2e-5")
            parsed = _parse_value(override, value)
            if key in _SOURCES and isinstance(parsed, (str, dict)):
                parsed = [parsed]  # merging with a list takes its place
            if key in SECTIONS and parsed is not None and not isinstance(parsed, dict):
                raise UserError(f"override {override!r}: {key} is a section; use {SECTIONS[key]}={value}")
            OmegaConf.update(values, key, parsed, merge=True)
        plain = OmegaConf.to_container(values, resolve=False)
        values = OmegaConf.create(_with_references(_with_paths(plain)))
        merged = OmegaConf.merge(OmegaConf.structured(Config), values)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{name}: {missing[0]} is required and not set")
        config = OmegaConf.to_object(merged)
        assert isinstance(config, Config)
        _check_strings(config, name)
        _check_secrets(to_dict(config), name)
        return config
    except OverflowError as error:  # an integer for a key that is a float; it says no key
        raise UserError(f"{name}: {_too_large(values) or 'a number'} is too large") from error
    except (OmegaConfBaseException, TypeError, LookupError) as error:
        raise UserError(f"{name}: {_explain(error)}") from error


def _with_paths(values: Any) -> Any:
    """Turn ``train: a.jsonl`` and ``train: [a.jsonl]`` into ``train: [{path: a.jsonl}]``."""
    for section, key in (name.split(".") for name in _SOURCES):
        sources = values.get(section, {}).get(key) if isinstance(values.get(section, {}), dict) else None
        if isinstance(sources, str) or (isinstance(sources, dict) and "path" in sources):
            sources = [sources]
        if isinstance(sources, list):
            values[section][key] = [{"path": one} if isinstance(one, str) else one for one in sources]
    return values


def _with_references(value: Any) -> Any:
    """Keep references to secret environment variables as they are: the config is written to files."""
    if isinstance(value, dict):
        return {key: _with_references(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_references(one) for one in value]
    if not isinstance(value, str) or not secret_names(value):
        return value
    return re.sub(r"(?<!\\)(?=\$\{oc\.env:)", r"\\", value)


def _check_strings(section: Any, name: str, prefix: str = "") -> None:
    """Refuse lists and dicts inside a list or dict of strings, which OmegaConf lets through.

    Raises:
        UserError: names the key.
    """
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            _check_strings(value, name, f"{path}.")
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in entries:
            if dataclasses.is_dataclass(one):
                _check_strings(one, name, f"{path}.{key}.")
            elif field.type in ("list[str]", "dict[str, str]") and not isinstance(one, str):
                raise UserError(f"{name}: {path}.{key}: {one!r} is not a string")


def _check_secrets(values: dict[str, Any], name: str, prefix: str = "") -> None:
    """Refuse secrets that are written out, and references to secrets where they are not replaced.

    Raises:
        UserError: names the key.
    """
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            _check_secrets(value, name, f"{path}.")
        elif isinstance(value, (list, tuple)):
            _check_secrets({f"{key}.{i}": one for i, one in enumerate(value)}, name, prefix)
        elif isinstance(value, str) and has_secret(value):
            raise UserError(
                f"{name}: {path} holds a token or password, which would be written to the run directory; put it into "
                "an environment variable, and write ${oc.env:NAME_TOKEN} in its place"
            )
        elif isinstance(value, str) and secret_names(value) and key != "path":
            raise UserError(f"{name}: {path} refers to a secret, which only the path of a data source may")


def _too_large(values: Any) -> str | None:
    """The key of the first integer that no float can hold."""
    from omegaconf import OmegaConf

    def find(value: Any, key: str) -> str | None:
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return key
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return next((found for name, one in pairs if (found := find(one, f"{key}.{name}" if key else str(name)))), None)

    return find(OmegaConf.to_container(values), "")


def _check_lora(overrides: list[str]) -> None:
    """Refuse ``lora=null`` beside a key of it, of which one would be ignored."""
    keys = [override for override in overrides if override.startswith("lora.")]
    if keys and any(override.replace(" ", "") in ("lora=null", "lora=") for override in overrides):
        raise UserError(f"override {keys[0]!r}: lora=null turns adapters off; leave one of the two out")


def _parse_value(override: str, text: str) -> Any:
    """Parse the value of an override as YAML, as in the config file."""
    import yaml
    from omegaconf import OmegaConf

    try:
        check_yaml(f"value: {text}", f"override {override[:80]!r}")
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index,call-overload]
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override {override!r}: not valid YAML: {_one_line(error)}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts, as it is written into a run directory."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; :func:`load` reads it back to an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_dict(config))))  # quotes strings that look like numbers


def save(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; see :func:`to_yaml`."""
    path.write_text(to_yaml(config), encoding="utf-8")


def _escaped(value: Any) -> Any:
    """Escape ``${`` in all strings, so that OmegaConf does not read it as a reference to another key."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(one) for one in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _explain(error: Any) -> str:
    """One line for an OmegaConf error: the full key, the problem, and the closest existing key."""
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    key = getattr(error, "full_key", None) or ""
    section = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(section):
        if (suggestion := suggest_key(key)) is not None:
            return f"unknown key {key!r}: {suggestion}"
        known = [f.name for f in dataclasses.fields(section)]
        close = difflib.get_close_matches(str(error.key), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if isinstance(error, IndexError) or not isinstance(error, OmegaConfBaseException):  # data.eval.0.path=x
        prefix = f"{key}: " if key else ""
        return f"{prefix}no such list entry; set the whole list, such as 'data.eval=[{{path: heldout.jsonl}}]'"
    message = _one_line(getattr(error, "msg", None) or error)
    message = message.split(" full_key:")[0]
    return f"{key}: {message}" if key else message
