"""``sft-jax generate``: answers to prompts, or a chat in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_jax.commands.shared import add_model, quiet_imports
from sft_jax.errors import UserError
from sft_jax.progress import Work

if TYPE_CHECKING:
    from sft_jax.assembly import Model
    from sft_jax.inference.sampling import Sampling


_HELP = "/reset clears the conversation; /exit or the end of input ends it; /help shows this"


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("generate", help="answer prompts, or chat in the terminal")
    add_model(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="can be repeated")
    parser.add_argument("--file", help="a file with one prompt per line, or a .jsonl with a 'prompt' in each row")
    parser.add_argument("--chat", action="store_true", help="chat in the terminal")
    parser.add_argument("--raw", action="store_true", help="continue plain text, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: greedy decoding")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; default 0: all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probabilities sum to P; default 1: all",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts generated at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Generate answers and print them."""
    if options.chat and (options.prompt or options.file or options.raw or options.json):
        raise UserError("--chat reads what you type; leave out --prompt, --file, --raw and --json")
    if not options.chat and not options.prompt and not options.file:
        raise UserError("nothing to answer; use --prompt TEXT, --file FILE, or --chat")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {options.max_new_tokens} is not at least 1")
    if options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size} is not at least 1")
    quiet_imports()
    from sft_jax.assembly import open_model
    from sft_jax.inference.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    prompts = [*options.prompt, *(read_prompts(options.file) if options.file else [])]
    model = open_model(options.model, options.base, options.step, options.dtype)
    stops = ", ".join(repr(token) for token in model.tokenizer.convert_ids_to_tokens(model.stop_ids))
    print(f"{model.description}; stop tokens {stops or 'none'}", file=sys.stderr)
    if options.chat:
        _talk(model, options.max_new_tokens, sampling, options.system)
    elif options.json or len(prompts) > 1:
        _answer(model, prompts, sampling, options)
    else:
        from sft_jax.run.generate import encode

        ids = encode(model.tokenizer, prompts[0], options.raw, options.system)
        stream = model.generator.stream(model.params, model.frozen, ids, options.max_new_tokens, sampling)
        _print_stream(model, stream, options.raw)
    return 0


def _answer(model: Model, prompts: Sequence[str], sampling: Sampling, options: argparse.Namespace) -> None:
    from sft_jax.run.generate import generate

    with Work("answering", len(prompts), "prompts") as work:
        answers = generate(
            model,
            prompts,
            options.max_new_tokens,
            sampling,
            options.raw,
            options.system,
            options.batch_size,
            work.update,
        )
    for prompt, (one, text) in zip(prompts, answers, strict=True):
        if options.json:
            row = {"prompt": prompt, "text": text, "token_ids": one.ids, "finish_reason": one.finish_reason}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(f"{prompt}\n→ {text}\n", flush=True)


def _talk(model: Model, max_new_tokens: int, sampling: Sampling, system: str | None) -> None:
    """Chat with history until the input ends."""
    from sft_jax.run.generate import chat

    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    print(_HELP, file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text in ("/exit", "/quit", "/bye"):
            return
        if text == "/reset":
            messages = list(start)
            continue
        if text.startswith("/") and " " not in text:
            print(_HELP if text == "/help" else f"{text} is no command; {_HELP}", file=sys.stderr)
            continue
        if not text:
            continue
        conversation = [*messages, {"role": "user", "content": text}]
        try:
            answer = _print_stream(model, chat(model, conversation, max_new_tokens, sampling), raw=False)
        except UserError as error:  # the context is full; the history is kept
            print(f"{error}; /reset clears the conversation", file=sys.stderr)
            continue
        messages = [*conversation, {"role": "assistant", "content": answer}]


def read_prompts(path: str) -> list[str]:
    """Read prompts from a file: one per line, or the ``prompt`` of each row of a ``.jsonl``.

    Raises:
        UserError: no such file, a row without a prompt, or no prompts at all.
    """
    from sft_jax.data.read.lines import read_json_lines

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


def _print_stream(model: Model, stream: Iterator[int], raw: bool) -> str:
    """Print the text while its tokens are generated, each character when it is complete; returns the whole text."""
    from sft_jax.run.generate import text_of

    ids: list[int] = []
    shown = ""
    for token in stream:
        if token not in model.stop_ids:
            ids.append(token)
        text = text_of(model.tokenizer, ids, raw)
        if text.startswith(shown):  # trailing blanks are stripped until the next word follows them
            complete = text.rstrip("\ufffd")
            print(complete[len(shown) :], end="", flush=True)
            shown = max(shown, complete, key=len)
    text = text_of(model.tokenizer, ids, raw)
    print(text[len(shown) :], flush=True)
    return text
