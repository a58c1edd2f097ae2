"""The tokenizer of a model folder, with the template and special tokens a config adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft_jax.errors import UserError


def load_tokenizer(
    folder: Path, chat_template: str | None = None, added_tokens: list[str] | None = None
) -> tuple[Any, int]:
    """A fast tokenizer (offsets are needed for masks) and how many tokens were added; remote code is never run.

    Args:
        folder: a Hugging Face folder with ``tokenizer.json`` or the files to build it from.
        chat_template: a Jinja file that replaces the tokenizer's own template.
        added_tokens: special tokens to add where the tokenizer does not have them.

    Raises:
        UserError: no tokenizer, no fast one, or no such template file.
    """
    from transformers import AutoTokenizer

    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: has a SentencePiece tokenizer.model only, which is not converted faithfully; "
            "add the tokenizer.json of the same model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}: no usable tokenizer: {' '.join(str(error).split())[:200]}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: only a slow tokenizer; add its tokenizer.json")
    num_added = tokenizer.add_tokens(added_tokens or [], special_tokens=True)
    if chat_template is not None:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise UserError(f"data.chat_template: no such file {chat_template}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer, num_added
