"""Answers of a model to prompts and conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sft_jax.assembly import Model
from sft_jax.data.chat.encoder import context_ids, prompt_ids
from sft_jax.inference.generator import Generated
from sft_jax.inference.sampling import Sampling


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    raw: bool = False,
    system: str | None = None,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda prompts: None,
) -> list[tuple[Generated, str]]:
    """An answer to each prompt: ids, and text without special tokens (an answer in a chat also without outer blanks).

    Args:
        raw: continue the prompt as plain text; otherwise it is a user's message in the model's chat template.
        system: a system message before each prompt.

    Raises:
        UserError: no chat template, or a prompt that is empty or leaves no room in the context.
    """
    encoded = [encode(model.tokenizer, prompt, raw, system) for prompt in prompts]
    written = model.generator(
        model.params, model.frozen, encoded, max_new_tokens, sampling, batch_size, progress=progress
    )
    return [(one, text_of(model.tokenizer, one.ids, raw)) for one in written]


def chat(
    model: Model, messages: Sequence[Mapping[str, Any]], max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[int]:
    """The tokens of the answer that comes next in a conversation, as they are written.

    Raises:
        UserError: no chat template, or the context is full.
    """
    ids = prompt_ids(model.tokenizer, [dict(message) for message in messages])
    return model.generator.stream(model.params, model.frozen, ids, max_new_tokens, sampling)


def encode(tokenizer: Any, prompt: str, raw: bool, system: str | None) -> list[int]:
    """The tokens of a prompt, as :func:`generate` reads it."""
    if raw:
        return context_ids(tokenizer, prompt)
    start = [{"role": "system", "content": system}] if system else []
    return prompt_ids(tokenizer, [*start, {"role": "user", "content": prompt}])


def text_of(tokenizer: Any, ids: Sequence[int], raw: bool) -> str:
    """What a user reads of an answer."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if raw else text.strip()
