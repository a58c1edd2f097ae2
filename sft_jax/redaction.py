"""Keeps tokens and passwords out of messages and files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|PRIVATE|CREDENTIAL|(API|ACCESS|AUTH)_?KEY", re.IGNORECASE)
_REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")
_SHORTEST = 8  # shorter values of the environment are not looked for in texts
_REDACTED = "[redacted]"


@dataclass(frozen=True)
class Form:
    """A form of secrets, and texts one of which is in every secret of this form."""

    kind: str
    pattern: str
    signs: tuple[str, ...]


_FORMS = (
    Form("Hugging Face token", r"\bhf_[A-Za-z0-9]{20,}", ("hf_",)),
    Form(
        "GitHub token", r"\b(?:gh[opsur]_|github_pat_)\w{20,}", ("gho_", "ghp_", "ghs_", "ghu_", "ghr_", "github_pat_")
    ),
    Form("GitLab token", r"\bglpat-[\w-]{20,}", ("glpat-",)),
    Form("AWS key", r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b", ("AKIA", "ASIA")),
    Form("Google key", r"\bAIza[\w-]{30,}|\bya29\.[\w.-]{20,}", ("AIza", "ya29.")),
    Form("API key", r"\bsk-[\w-]{20,}|\b[sr]k_live_[A-Za-z0-9]{16,}", ("sk-", "k_live_")),
    Form("Slack token", r"\bxox[abprs]-[\w-]{20,}", ("xox",)),
    Form("PyPI token", r"\bpypi-AgE[\w-]{40,}", ("pypi-AgE",)),
    Form("npm token", r"\bnpm_[A-Za-z0-9]{36}\b", ("npm_",)),
    Form("private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\sA-Za-z0-9+/=]{64,}", (" PRIVATE KEY-----",)),
    Form("JSON web token", r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{16,}", ("eyJ",)),
    Form("password in a URL", r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)", ("://",)),
    Form("bearer token", r"(?<=Bearer )[\w.~+/-]{12,}=*", ("Bearer ",)),
    Form(
        "signature in a URL",
        r"(?<=[?&])(?:X-Goog-Signature|X-Amz-Signature|X-Amz-Security-Token|access_token|token|sig)=[^&\s'\"]+",
        ("Signature=", "oken=", "sig="),
    ),
)
_SECRETS = re.compile("|".join(f"({form.pattern})" for form in _FORMS))
_SIGNS = tuple(sign for form in _FORMS for sign in form.signs)


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


def secrets_in(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yields the kind and the place of each token of a known form; quickly if a text has none."""
    if any(sign in text for sign in _SIGNS):
        for found in _SECRETS.finditer(text):
            yield _FORMS[(found.lastindex or 1) - 1].kind, found


def secret_names(text: str) -> list[str]:
    """The secret environment variables that a text refers to as ``${oc.env:NAME}``."""
    return [name for name in _REFERENCE.findall(text) if is_secret_name(name)]


def with_secrets(text: str) -> str:
    """Replaces references to secret environment variables by their values.

    Raises:
        KeyError: a variable is not set.
    """
    return _REFERENCE.sub(lambda found: os.environ[found[1]] if is_secret_name(found[1]) else found[0], text)
