"""Checks that the chat template ends a turn with a stop token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft_jax.checking.result import FAILED, NOT_CHECKED, OK, Result
from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.rows import Conversation, RowError

_TURN = [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": "The Danube."}]


def check_chat(tokenizer: Any, stop_ids: Sequence[int], is_tuned: bool) -> Result:
    """Whether the template ends an assistant turn with a token that generation stops at.

    A base model may have a template whose end-of-turn token it does not stop at yet: training supervises this token,
    and an export adds it to ``generation_config.json``. After tuning, this is a failure.

    Args:
        stop_ids: the ids that generation stops at.
        is_tuned: whether the model is a run or an export.
    """
    name = "chat template"
    if not tokenizer.chat_template:
        return Result(name, NOT_CHECKED, "the tokenizer has none; data.chat_template sets one")
    encoder = Encoder(tokenizer, stop_ids=stop_ids)
    (encoded,) = encoder.encode([Conversation(_TURN, [None] * len(_TURN))])
    if isinstance(encoded, RowError):
        return Result(name, FAILED, str(encoded))
    stop = next(iter(encoder.tally.stops))
    text = repr(tokenizer.convert_ids_to_tokens(stop))
    if stop in stop_ids:
        return Result(name, OK, f"a turn ends with {text}, a stop token of generation")
    names = zip(stop_ids, tokenizer.convert_ids_to_tokens(list(stop_ids)), strict=True)
    stops = ", ".join(f"the unknown id {i}" if token is None else repr(token) for i, token in names) or "no token"
    details = f"a turn ends with {text}, but generation stops at {stops}"
    if is_tuned:
        return Result(name, FAILED, details)
    return Result(name, OK, f"{details} until the model is tuned, which adds {text}")
