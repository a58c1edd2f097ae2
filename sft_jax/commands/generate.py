"""Writing with a model: answers to prompts, or a conversation at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sft_jax.data.chat import context_ids, prompt_ids
from sft_jax.data.lines import read_json_lines
from sft_jax.errors import UserError
from sft_jax.inference.generator import Generated
from sft_jax.inference.sampling import Sampling
from sft_jax.opening import Opened, open_model


def generate(
    model: Opened,
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
    encoded = [_encode(model.tokenizer, prompt, raw, system) for prompt in prompts]
    written = model.generator()(
        model.adapter, model.frozen, encoded, max_new_tokens, sampling, batch_size, progress=progress
    )
    return [(one, _text(model.tokenizer, one.ids, raw)) for one in written]


def run_generate(
    name: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    raw: bool = False,
    system: str | None = None,
    batch_size: int = 16,
    base: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    as_json: bool = False,
) -> None:
    """``sft-jax generate`` with prompts: prints the answers; a single one as it is written.

    Raises:
        UserError: as :func:`generate` and :func:`open_model`.
    """
    model = _open(name, base, step, dtype)
    if as_json or len(prompts) > 1:
        with tqdm(total=len(prompts), unit="prompt", leave=False, disable=None) as bar:
            answers = generate(model, prompts, max_new_tokens, sampling, raw, system, batch_size, bar.update)
        for prompt, (one, text) in zip(prompts, answers, strict=True):
            if as_json:
                row = {"prompt": prompt, "text": text, "token_ids": one.ids, "finish_reason": one.finish_reason}
                print(json.dumps(row, ensure_ascii=False))
            else:
                print(f"{prompt}\n→ {text}\n", flush=True)
        return
    ids = _encode(model.tokenizer, prompts[0], raw, system)
    _print_stream(model, model.generator().stream(model.adapter, model.frozen, ids, max_new_tokens, sampling), raw)


def run_chat(
    name: str,
    max_new_tokens: int,
    sampling: Sampling,
    system: str | None = None,
    base: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
) -> None:
    """``sft-jax generate --chat``: a conversation with history, until the input ends.

    Raises:
        UserError: as :func:`open_model`.
    """
    model = _open(name, base, step, dtype)
    generator = model.generator()
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    print("/reset forgets the conversation, /exit or the end of input ends it", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/exit":
            return
        if said == "/reset":
            messages = list(start)
            continue
        if not said:
            continue
        asked = [*messages, {"role": "user", "content": said}]
        ids = prompt_ids(model.tokenizer, asked)
        try:
            stream = generator.stream(model.adapter, model.frozen, ids, max_new_tokens, sampling)
            answer = _print_stream(model, stream, raw=False)
        except UserError as error:  # the context is full; what was said before is still there
            print(f"{error}; /reset starts anew", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: one a line, or ``prompt`` of each row of a ``.jsonl``.

    Raises:
        UserError: no such file, a row without a prompt, or none at all.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file")
    if file.suffix == ".jsonl":
        rows = read_json_lines(file)
        for i, row in enumerate(rows):
            if not isinstance(row.get("prompt"), str):
                raise UserError(f"{path} row {i}: has no string 'prompt'")
        return [row["prompt"] for row in rows]
    prompts = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path}: has no prompts")
    return prompts


def _open(name: str, base: str | None, step: int | None, dtype: str | None) -> Opened:
    model = open_model(name, base, step, dtype)
    stops = ", ".join(repr(token) for token in model.tokenizer.convert_ids_to_tokens(model.stop_ids))
    print(f"{model.description}; stops at {stops or 'the length limit only'}", file=sys.stderr)
    return model


def _encode(tokenizer: Any, prompt: str, raw: bool, system: str | None) -> list[int]:
    if raw:
        return context_ids(tokenizer, prompt)
    start = [{"role": "system", "content": system}] if system else []
    return prompt_ids(tokenizer, [*start, {"role": "user", "content": prompt}])


def _text(tokenizer: Any, ids: Sequence[int], raw: bool) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if raw else text.strip()


def _print_stream(model: Opened, stream: Iterator[int], raw: bool) -> str:
    """Print text as its tokens come, each character once it is whole; returns all of it."""
    ids: list[int] = []
    shown = ""
    for token in stream:
        if token not in model.stop_ids:
            ids.append(token)
        text = _text(model.tokenizer, ids, raw)
        if text.startswith(shown):  # blanks at the end may belong to a next word, or to nothing
            whole = text.rstrip("\ufffd")
            print(whole[len(shown) :], end="", flush=True)
            shown = max(shown, whole, key=len)
    text = _text(model.tokenizer, ids, raw)
    print(text[len(shown) :], flush=True)
    return text
