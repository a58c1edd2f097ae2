"""Secrets in texts: tokens of a known form that are not placeholders, such as those of documentation."""

from __future__ import annotations

import math
import re
from collections import Counter

from sft_jax.redaction import secrets_in

_PLACEHOLDER = re.compile(
    r"example|sample|placeholder|your|dummy|fake|redacted|insert|replace|secret|passw|token_?here|key_?here|"
    r"x{4,}|\*{3,}|\.{3,}|_{4,}|[<>{}$%]|0{6,}|1234567|abcdefg",
    re.IGNORECASE,
)
_LOCAL = re.compile(r"@(?:localhost|127\.|0\.0\.0\.0|host\b|[\w.-]*example\b)")
_LOGIN = re.compile(r"[\w.%+~-]{1,64}:(?!(?:pass|admin|root|test|user|abc|foo|bar)\d*$)[\w!#$%&*+.=?^~-]{6,64}")
_BITS_PER_CHARACTER = 3.0  # of random characters; English words in a row have fewer digits, placeholders fewer bits


def find_secrets(text: str) -> list[str]:
    """Return what kinds of secrets a text has, each with the first four characters of the secret, never more.

    ``["Hugging Face token hf_a…"]``
    """
    found = []
    for kind, match in secrets_in(text):
        secret = match[0]
        if kind == "password in a URL":
            if _LOCAL.match(text, match.end()) or not _LOGIN.fullmatch(secret) or not _has_both(secret.split(":")[1]):
                continue
        elif kind == "signature in a URL":
            if not _is_random(secret.partition("=")[2]):
                continue
        elif kind != "private key" and not _is_random(secret):
            continue
        if kind == "private key" or not _PLACEHOLDER.search(secret.partition("=")[2] or secret):
            found.append(f"{kind} {secret[:4]}…")
    return found


def _is_random(secret: str) -> bool:
    """Whether characters look like those of a key: letters and digits, and hardly any repetitions."""
    if len(secret) < 16 or not _has_both(secret):
        return False
    shares = [count / len(secret) for count in Counter(secret).values()]
    return -sum(share * math.log2(share) for share in shares) >= _BITS_PER_CHARACTER


def _has_both(text: str) -> bool:
    return any(c.isdigit() for c in text) and any(c.isalpha() for c in text)
