"""Checks of the files of a tokenizer, and of the tokenizer that a library has made from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError, refuse_lfs_pointer
from sft_jax.files.json_object import MOST_BYTES, open_file, parse_object

MOST_TOKENIZER_BYTES = 256 * 2**20  # of tokenizer.json; those with 250,000 tokens have 35 MB
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_SETTINGS += ("chat_template.json", "processor_config.json")
_MOST_BYTES = dict.fromkeys(_SETTINGS, MOST_BYTES) | {"tokenizer.json": MOST_TOKENIZER_BYTES}
_TEXT = "Hello, 42\n  wörld 世界 🙂"
_MOST_GROWTH = 1_000_000  # characters that a normalizer may write for a short text


def check_files(folder: Path) -> None:
    """Checks what transformers reads without a look at it: a pipe may never end, and JSON may be of any size."""
    for name, most_bytes in _MOST_BYTES.items():
        path = folder / name
        if os.path.lexists(path):
            with open_file(path, most_bytes) as file:
                refuse_lfs_pointer(start := file.read(64), path)
                if name in _SETTINGS and name.endswith(".json"):
                    parse_object(start + file.read(), path)


def try_out(tokenizer: Any) -> None:
    """Tokenizes and decodes a short text with what texts have: letters, digits, a line break, other scripts.

    A tokenizer that was stored while it truncated or padded would still do so here, but not in transformers.

    Raises:
        UserError: it makes texts very much longer. Any other exception of the library, if it fails.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    _check_growth(backend.normalizer)
    encoded = backend.encode(_TEXT)
    backend.decode(encoded.ids[:8])


def _check_growth(normalizer: Any) -> None:
    """Follows a text with all patterns through the replacements: without memory, the library ends the process."""
    replacements = [] if normalizer is None else list(_replacements(json.loads(normalizer.__getstate__())))
    text = _TEXT + "".join(pattern or "" for pattern, _ in replacements)
    for pattern, content in replacements:
        text = text.replace(pattern, content) if pattern else text + content
        if len(text) > _MOST_GROWTH:
            raise UserError(f"the normalizer of tokenizer.json writes {len(text):,} characters for a short text")


def _replacements(settings: Any) -> Iterator[tuple[str | None, str]]:
    """Pattern and content of each replacement of a normalizer; None for a regular expression."""
    for one in settings.get("normalizers", [settings]) if isinstance(settings, dict) else []:
        if "normalizers" in one:
            yield from _replacements(one)
        elif one.get("type") == "Replace":
            yield one["pattern"].get("String"), one["content"]


def check_ids(tokenizer: Any, vocab_size: int) -> None:
    """Checks that every token has an embedding, in a table that grows to the number of tokens if that is larger.

    Raises:
        UserError: a token has a larger id.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=itemgetter(1), default=("", -1))
    if largest >= (size := max(vocab_size, len(tokenizer))):
        raise UserError(f"tokenizer.json: token {token!r} has the id {largest:,}, but there are {size:,} embeddings")


def check_template(template: Any, folder: Path) -> None:
    """Checks that the chat template of a tokenizer is a text, or several texts by name."""
    named = template if isinstance(template, dict) else {"default": template or ""}
    if not all(isinstance(one, str) for one in (*named, *named.values())):
        raise UserError(f"{folder}: chat_template is neither a text nor texts by name; set data.chat_template")
