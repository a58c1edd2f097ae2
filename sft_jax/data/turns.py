"""Where the trained turns of a conversation are in the text its template writes, proven against what inference sees.

A model answers after the rendering of the messages before, with the generation prompt. An answer is trained in a text
only if that text begins with just this rendering; where the template writes earlier turns differently once later ones
follow (Qwen3 takes their reasoning out), the conversation is split into texts that end after an answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sft_jax.data.rows import Message, RowError
from sft_jax.data.template import ChatTemplate, Span

_THINK = re.compile(r"</?think>")


@dataclass(frozen=True)
class Rendered:
    """One text to train on, and where in it is what.

    Args:
        turns: characters of each trained message, by the message's number.
        contents: role and characters of every message whose words were found.
    """

    text: str
    turns: dict[int, Span]
    contents: list[tuple[str, Span]]
    notes: Counter[str] = field(default_factory=Counter)


class TurnFinder:
    """Finds turns with one template.

    Args:
        special_tokens: texts of the tokens that may end a turn.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Collection[str]):
        self._template = template
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")

    def find(self, messages: list[Message], tools: list[dict[str, Any]] | None, trained: list[int]) -> list[Rendered]:
        """The conversation as one text, or as several where no one text has every trained turn as inference sees it.

        Args:
            trained: numbers of the messages to train, ascending; at least one.

        Raises:
            RowError: the template fails, or what it writes cannot be proven right.
        """
        view = _View(self._template, messages, tools, self._special)
        found = []
        waiting, size = list(trained), len(messages)
        while waiting:
            text, marks = view.rendered(size)
            turns = {i: span for i in waiting if (span := view.turn(i, text, marks, size)) is not None}
            if turns:
                contents = _account(text, messages[:size], turns, view.notes)
                found.append(Rendered(text, turns, contents, view.notes))
                view.notes = Counter()
                waiting = [i for i in waiting if i not in turns]
            if waiting:
                size = waiting[-1] + 1
        if len(found) > 1:
            found[0].notes["conversations split, because the template rewrites earlier turns"] += 1
        return found[::-1]


class _View:
    """Renderings of the beginnings of one conversation, each made once."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        special: re.Pattern[str],
    ):
        self._template, self._messages, self._tools, self._special = template, messages, tools, special
        self._texts: dict[int, tuple[str, list[Span]]] = {}
        self._begins: dict[int, int] = {}
        self.notes: Counter[str] = Counter()

    def rendered(self, size: int) -> tuple[str, list[Span]]:
        """The first ``size`` messages, and the template's marks."""
        if size not in self._texts:
            self._texts[size] = self._template.render(self._messages[:size], self._tools)
        return self._texts[size]

    def turn(self, i: int, text: str, marks: list[Span], size: int) -> Span | None:
        """Where message ``i`` is in ``text``, of ``size`` messages; None if inference would see another text."""
        alone = self.rendered(i + 1)[0]
        end = len(text) if i + 1 == size else self._end_in(text, alone)
        if end is None:
            return None
        if self._template.is_marked:
            begin, end = self._marked(i, marks, size)
            prompt = self._template.generation_prompt
            if prompt and text.startswith(prompt, begin):
                self.notes["trained turns with their header, because the template's mark encloses it"] += 1
            return begin, end
        if i not in self._begins:
            self._begins[i] = self._begin(i, alone)
        return self._begins[i], end

    def _begin(self, i: int, text: str) -> int:
        """Where message ``i``, the last of ``text``, begins: after what prompts for it."""
        try:
            prompt = self._template.render(self._messages[:i], self._tools, prompt=True)[0]
        except RowError:
            if i > 0:
                raise
            prompt = None  # most templates cannot write an empty conversation
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        # As far as another answer to the same messages is written alike; a blank before a word is the word's.
        other = {"role": self._messages[i]["role"], "content": "\u2603"}
        begin = _common(text, self._template.render([*self._messages[:i], other], self._tools)[0])
        begin = len(text[:begin].rstrip(" "))
        if i > 0:
            before = self._end_in(text, self.rendered(i)[0])
            if before is None or before > begin:
                raise RowError(f"message {i}: the template writes the messages before it in another way than alone")
            self.notes["answers that do not follow the template's own generation prompt"] += 1
        return begin

    def _marked(self, i: int, marks: list[Span], size: int) -> Span:
        """The template's own mark of message ``i``."""
        answers = [j for j, message in enumerate(self._messages[:size]) if message["role"] == "assistant"]
        marks = [mark for mark in marks if mark[1] > mark[0]]
        if len(marks) > len(answers):  # marks that touch are one
            joined: list[Span] = []
            for begin, end in marks:
                if joined and joined[-1][1] == begin:
                    joined[-1] = (joined[-1][0], end)
                else:
                    joined.append((begin, end))
            marks = joined
        if len(marks) != len(answers):
            raise RowError(f"the template marks {len(marks)} turns as generated, there are {len(answers)} answers")
        return marks[answers.index(i)]

    def _end_in(self, text: str, beginning: str) -> int | None:
        """How much of ``text`` is ``beginning``, but for special tokens that only the very end has; None if it differs.

        ``<|end|><|eos|>`` at the end of a beginning may be ``<|end|>`` in the text: one special token has to stay.
        """
        if text.startswith(beginning):
            return len(beginning)
        cut = len(beginning)
        specials = list(self._special.finditer(beginning))
        while len(specials) > 1 and not beginning[specials[-1].end() : cut].strip():
            cut = specials.pop().start()
            if beginning[specials[-1].end() : cut].strip():
                return None
            if text.startswith(beginning[:cut]):
                return cut
        return None


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _account(text: str, messages: list[Message], turns: dict[int, Span], notes: Counter[str]) -> list[tuple[str, Span]]:
    """Prove that each turn has its own words and none of another message; returns where words were found.

    Raises:
        RowError: a trained turn lacks its own words, or has those of another message.
    """
    found: list[tuple[str, Span]] = []
    begins = sorted(turns.values())
    at = 0
    for i, message in enumerate(messages):
        if i in turns:
            begin, end = turns[i]
            _own_words(message, text[begin:end], i)
            if not message.get("content", "").strip() and "tool_calls" not in message:
                notes["trained answers that are empty"] += 1
            found.append((message["role"], (begin, end)))
            at = max(at, end)
            continue
        words = _words(message)[-1].strip()
        if not words:
            continue
        limit = next((begin for begin, _ in begins if begin >= at), len(text))
        place = text.find(words, at, limit)
        if place >= 0:
            found.append((message["role"], (place, place + len(words))))
            at = place + len(words)
            continue
        outside, rest = [], 0
        for begin, end in begins:
            outside.append(text[rest:begin])
            rest = end
        if any(words in part for part in [*outside, text[rest:]]):
            continue  # a system message may be moved
        if any(words in text[begin:end] for begin, end in begins):
            raise RowError(f"message {i} ({message['role']}): its words are in a trained answer and nowhere else")
        notes[f"{message['role']} messages that the template does not write word by word"] += 1
    return found


def _words(message: Message) -> list[str]:
    """The content of a message; where it has thoughts in it, those by themselves, as templates set them apart."""
    content = message.get("content", "")
    return _THINK.split(content) if "think>" in content else [content]


def _own_words(message: Message, turn: str, i: int) -> None:
    for part in _words(message):
        if part.strip() not in turn:
            raise RowError(f"message {i}: the template does not write its content as it is, so no mask can be proven")
    for name in ("reasoning_content", "reasoning", "thinking"):
        if name in message and message[name].strip() not in turn:
            raise RowError(
                f"message {i}: the template does not write its {name}; set data.reasoning to exclude, or use a "
                "template that does"
            )
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in turn:
            raise RowError(f"message {i}: the template does not write its tool calls; use one that does")
