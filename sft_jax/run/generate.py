"""Generates answers to prompts and conversations."""

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
    """Generate an answer to each prompt; returns token ids, and text without special tokens.

    Args:
        raw: continue the prompt as plain text; otherwise it is a user message in the model's chat template, and
            whitespace around the answer is stripped.
        system: a system message before each prompt.

    Raises:
        UserError: no chat template, or a prompt that is empty or fills the context.
    """
    encoded = [encode(model.tokenizer, prompt, raw, system) for prompt in prompts]
    answers = model.generator(
        model.params, model.frozen, encoded, max_new_tokens, sampling, batch_size, progress=progress
    )
    return [(answer, text_of(model.tokenizer, answer.ids, raw)) for answer in answers]


def chat(
    model: Model, messages: Sequence[Mapping[str, Any]], max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[int]:
    """Generate the next answer in a conversation, and yield its tokens.

    Raises:
        UserError: no chat template, or the context is full.
    """
    ids = prompt_ids(model.tokenizer, [dict(message) for message in messages])
    return model.generator.stream(model.params, model.frozen, ids, max_new_tokens, sampling)


def encode(tokenizer: Any, prompt: str, raw: bool, system: str | None) -> list[int]:
    """Tokenize a prompt as :func:`generate` does."""
    if raw:
        return context_ids(tokenizer, prompt)
    start = [{"role": "system", "content": system}] if system else []
    return prompt_ids(tokenizer, [*start, {"role": "user", "content": prompt}])


def text_of(tokenizer: Any, ids: Sequence[int], raw: bool) -> str:
    """Decode an answer without special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if raw else text.strip()
