"""One pass over the texts of all examples: empty and copied answers, how they end, their script, secrets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sft_jax.data.lint.blocks import blocks
from sft_jax.data.lint.columns import Columns
from sft_jax.data.lint.endings import ending
from sft_jax.data.lint.scripts import main_scripts
from sft_jax.data.lint.secrets import find_secrets
from sft_jax.data.tokens.prepare import Prepared

_THINK = re.compile(r"<think>\s*</think>")  # templates write empty reasoning before answers
_SHORTEST_COPY = 12  # characters: shorter answers are often a word of their question


@dataclass
class Texts:
    """What the texts of examples are like."""

    is_blank: np.ndarray  # bool, whether the answer is empty or white space
    ending: np.ndarray  # uint8, of the answer, see :mod:`sft_jax.data.lint.endings`
    script: np.ndarray  # uint8, of the answer, see :mod:`sft_jax.data.lint.scripts`
    copied: list[int] = field(default_factory=list)  # examples whose answer is their question
    secrets: dict[int, list[str]] = field(default_factory=dict)  # kinds of secrets of each example that has some


def read_texts(data: Prepared, columns: Columns, progress: Callable[[int], object] = lambda examples: None) -> Texts:
    """Decode all examples once, some at a time.

    Args:
        progress: called with the number of examples done since the last call.
    """
    examples, tokenizer = data.examples, data.encoder.tokenizer
    num = len(examples)
    texts = Texts(np.zeros(num, bool), np.zeros(num, np.uint8), np.zeros(num, np.uint8))

    def decode(ids: list[list[int]]) -> list[str]:
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)

    for block in blocks(examples):
        begins, ends = columns.begins[block.index], columns.ends[block.index]
        spans = zip(block.starts.tolist(), begins.tolist(), ends.tolist(), block.lengths.tolist(), strict=True)
        ids = block.ids.tolist()
        before, inside, behind = [], [], []
        for start, begin, end, length in spans:
            before.append(ids[start : start + begin])
            inside.append(ids[start + begin : start + end])
            behind.append(ids[start + end : start + length])
        questions, answers, rests = decode(before), decode(inside), decode(behind)
        texts.script[block.index] = main_scripts(answers)
        for i, question, answer, rest in zip(block.index.tolist(), questions, answers, rests, strict=True):
            texts.ending[i] = ending(answer)
            plain = answer.strip()
            texts.is_blank[i] = not plain or not _THINK.sub("", plain).strip()
            if len(plain) >= _SHORTEST_COPY and plain in question and _is_copy(data, i, plain):
                texts.copied.append(i)
            if found := [secret for text in (question, answer, rest) for secret in find_secrets(text)]:
                texts.secrets[i] = found
        progress(len(block.index))
    return texts


def _is_copy(data: Prepared, index: int, answer: str) -> bool:
    """Whether an answer is the whole message before it, as the row has it: an extract of a passage is no copy."""
    row = int(data.examples.row[index])
    conversation = data.sources[int(data.examples.source[index])].row(row, data.encoder.keep_reasoning)
    return conversation.question_before(answer) == answer
