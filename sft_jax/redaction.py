"""Keeps tokens and passwords out of messages and files."""

from __future__ import annotations

import os
import re
from typing import Any

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|PRIVATE|CREDENTIAL|(API|ACCESS|AUTH)_?KEY", re.IGNORECASE)
_REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")
_SHORTEST = 8  # shorter values of the environment are not looked for in texts
_REDACTED = "[redacted]"
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\b(?:gh[opsur]_|github_pat_)\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"  # AWS
    r"|\bAIza[\w-]{30,}"  # Google
    r"|\bya29\.[\w.-]{20,}"
    r"|\bsk-[\w-]{20,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@host
    r"|(?<=Bearer )[\w.~+/-]{12,}=*"
    r"|(?<=[?&])(?:X-Goog-Signature|X-Amz-Signature|X-Amz-Security-Token|access_token|token|sig)=[^&\s'\"]+"
)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable is likely to hold a secret, by its name."""
    return _SECRET_NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """Replaces secrets in a text: the values of environment variables that hold one, and tokens of known forms."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret_name(name):
            text = text.replace(value, _REDACTED)
    return _SECRETS.sub(_REDACTED, text)


def values_without_secrets(value: Any) -> Any:
    """Replaces secrets in every text of nested dicts and lists."""
    if isinstance(value, dict):
        return {key: values_without_secrets(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [values_without_secrets(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def has_secret(text: str) -> bool:
    """Whether a text has a token of a known form."""
    return _SECRETS.search(text) is not None


def secret_names(text: str) -> list[str]:
    """The secret environment variables that a text refers to as ``${oc.env:NAME}``."""
    return [name for name in _REFERENCE.findall(text) if is_secret_name(name)]


def with_secrets(text: str) -> str:
    """Replaces references to secret environment variables by their values.

    Raises:
        KeyError: a variable is not set.
    """
    return _REFERENCE.sub(lambda found: os.environ[found[1]] if is_secret_name(found[1]) else found[0], text)
