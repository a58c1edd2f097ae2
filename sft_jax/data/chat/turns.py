"""Where the trained turns of a conversation are in the text its template writes, proven against what inference sees.

A model answers after the rendering of the messages before, with the generation prompt. An answer is trained in a text
only if that text begins with just this rendering; where the template writes earlier turns differently once later ones
follow (Qwen3 takes their reasoning out), the conversation is split into texts that end after an answer; where it writes
even the prompt differently once the answer follows, the text is put together from the prompt and the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from sft_jax.data.chat.forms import in_form
from sft_jax.data.chat.seen import Tools, parts_of, unseen
from sft_jax.data.chat.template import ChatTemplate, ChatTemplates, Span
from sft_jax.data.chat.thoughts import openings, thought_of
from sft_jax.data.read.messages import REASONING
from sft_jax.data.read.rows import Conversation, Message, RowError

_THINK = re.compile(r"</?think>")
_PLAIN = {"role", "content", *REASONING}
_LEAST = 4  # characters of a generation prompt that tell it
_CERTAIN = 16  # characters of a message that no template has by chance


@dataclass(frozen=True)
class Rendered:
    """One text to train on, and where in it is what.

    Args:
        turns: characters of each trained message, by the message's number.
        contents: role and characters of every message whose words were found.
        is_marked: the turns are those that the template marks as generated.
    """

    text: str
    turns: dict[int, Span]
    contents: list[tuple[str, Span]]
    notes: Counter[str] = field(default_factory=Counter)
    is_marked: bool = False


class TurnFinder:
    """Finds turns with the templates of one tokenizer.

    Args:
        special_tokens: texts of the tokens that may end a turn.
    """

    def __init__(self, templates: ChatTemplates, special_tokens: Collection[str]):
        self._templates = templates
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")

    def find(self, conversation: Conversation, trained: list[int]) -> tuple[list[Rendered], set[str]]:
        """The conversation as one text, or as several where no one text has every trained turn as inference sees it.

        Args:
            trained: numbers of the messages to train, ascending; at least one.

        Returns:
            The texts, and the names of what the template reads in none of them.

        Raises:
            RowError: the template fails, leaves out a part, or what it writes cannot be proven right.
            UserError: no template is for such conversations.
        """
        template = self._templates.choose(bool(conversation.tools))
        template.check_kwargs(conversation.template_kwargs)
        conversation = in_form(template, conversation)
        view = _View(template, conversation, self._special)
        found: list[Rendered] = []
        unread = {f"chat_template_kwargs.{name}" for name in conversation.template_kwargs.keys() - template.reads}
        read: set[str] = set()
        waiting, size = list(trained), len(conversation.messages)
        while waiting:
            text, marks = view.text(size, waiting)
            turns = {i: span for i in waiting if (span := view.turn(i, text, marks, size)) is not None}
            if turns:
                contents, is_certain = _account(template, text, conversation.messages[:size], turns, view.notes)
                if conversation.tools or not is_certain:
                    left_out, seen = view.unseen(size, max(turns))
                    unread |= left_out
                    read |= seen
                found.append(Rendered(text, turns, contents, view.notes, template.is_marked))
                view.notes = Counter()
                waiting = [i for i in waiting if i not in turns]
            if waiting:
                size = waiting[-1] + 1
        if len(found) > 1:
            found[0].notes["conversations split, because the template rewrites earlier turns"] += 1
        return found[::-1], unread - read


class _View:
    """Renderings of the beginnings of one conversation, each made once."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, special: re.Pattern[str]):
        self._template, self._special = template, special
        self._messages, self._tools = conversation.messages, conversation.tools
        self._kwargs = conversation.template_kwargs
        self._texts: dict[int, tuple[str, list[Span]]] = {}
        self._answers: dict[int, tuple[str, int]] = {}
        self._built: set[int] = set()
        self.notes: Counter[str] = Counter()

    def _render(self, messages: list[Message], tools: Tools, prompt: bool = False) -> tuple[str, list[Span]]:
        return self._template.render(messages, tools, prompt, self._kwargs)

    def rendered(self, size: int) -> tuple[str, list[Span]]:
        """The first ``size`` messages, and the template's marks."""
        if size not in self._texts:
            self._texts[size] = self._render(self._messages[:size], self._tools)
        return self._texts[size]

    def text(self, size: int, trained: Collection[int]) -> tuple[str, list[Span]]:
        """The text of ``size`` messages to train on, of which the last may be an answer, and the template's marks."""
        text, marks = self.rendered(size)
        return (self._answer(size - 1)[0], marks) if size - 1 in trained else (text, marks)

    def turn(self, i: int, text: str, marks: list[Span], size: int) -> Span | None:
        """Where message ``i`` is in ``text``, of ``size`` messages; None if inference would see another text."""
        alone, begin = self._answer(i)
        end = len(text) if i + 1 == size else self._end_in(text, alone)
        if end is None:
            return None
        if self._template.is_marked:
            begin, end = self._marked(i, marks, size)
            prompt = self._template.generation_prompt
            if prompt and text.startswith(prompt, begin):
                self.notes["trained turns with their header, because the template's mark encloses it"] += 1
        return begin, end

    def unseen(self, size: int, last: int) -> tuple[set[str], set[str]]:
        """Names of what the text of ``size`` messages leaves out and does not need, and of what it has.

        Args:
            last: the last message that is trained in it; what follows that is no matter.

        Raises:
            RowError: it leaves out a part that it needs.
        """
        is_built = last == size - 1 and last in self._built
        stop = last if is_built else size
        parts = parts_of(self._messages[:stop], self._tools)

        def render(messages: list[Message], tools: Tools) -> str:
            return self._render(messages, tools, prompt=is_built)[0]

        left_out = unseen(render, self._messages[:stop], self._tools, parts)
        for part in left_out:
            if part.is_needed and not (part.where[0] == "messages" and part.where[1] > last):
                roles = ", ".join(dict.fromkeys(message["role"] for message in self._messages))
                way = (
                    f"leave it out with data.*.ignore_columns: [{part.where[0]}]"
                    if part.where[0] == "tools"
                    else (f"take it out (the roles met are {roles})")
                )
                raise RowError(f"{part}; use a template that does, or {way}")
        found = {part.name for part in left_out if not part.is_needed}
        return found, {part.name for part in parts if not part.is_needed} - found

    def _answer(self, i: int) -> tuple[str, int]:
        """The text that ends with message ``i``, as a model asked for it would write it, and where it begins."""
        if i not in self._answers:
            self._answers[i] = self._prompted(i)
        return self._answers[i]

    def _prompted(self, i: int) -> tuple[str, int]:
        text = self.rendered(i + 1)[0]
        try:
            prompt = self._render(self._messages[:i], self._tools, prompt=True)[0]
        except RowError:
            if i > 0:
                raise
            return text, self._own_begin(i, text)  # most templates cannot write an empty conversation
        if text.startswith(prompt):
            return text, len(prompt)
        if self._template.is_marked:
            raise RowError(
                f"message {i}: the template writes what stands before it in another way when it is asked to answer, so "
                "that it would be trained in a context that generation never has; use a template without "
                "{% generation %} marks, whose turns are found by rendering"
            )
        self._built.add(i)
        return self._built_after(i, prompt, text), len(prompt)

    def _own_begin(self, i: int, text: str) -> int:
        """As far as another answer to the same messages is written alike; a blank before a word is the word's."""
        other = {"role": self._messages[i]["role"], "content": "\u2603"}
        begin = _common(text, self._render([*self._messages[:i], other], self._tools)[0])
        return len(text[:begin].rstrip(" "))

    def _built_after(self, i: int, prompt: str, text: str) -> str:
        """The generation prompt and the characters of the answer that ``text`` ends with.

        A template may move or merge messages, or leave out thoughts, as soon as an answer follows: the answer is then
        taken from its rendering, from where that has the end of the generation prompt.
        """
        begin = self._own_begin(i, text)
        at = self._after(i, text, begin, prompt)
        if at is not None:
            self.notes["answers put after the generation prompt, which the template writes in another way"] += 1
            return prompt + text[at:]
        thought = thought_of(self._messages[i])
        for opening in openings(prompt):
            at = self._after(i, text, begin, opening.stem)
            if at is None:
                continue
            if opening.end is None:
                if thought.strip():
                    raise RowError(
                        f"message {i}: it has a thought, and the generation prompt closes that before the answer; say "
                        "otherwise with data.template_kwargs, or set data.reasoning to exclude"
                    )
                self.notes["answers put after a thought that the generation prompt has closed"] += 1
                return prompt + text[at:]
            if not thought.strip():
                self.notes["answers without a thought, closed at once because the generation prompt opens one"] += 1
            closed = thought.strip("\n") + opening.end
            if prompt.endswith("\n"):  # else the break after the prompt would be another token than at inference
                closed = closed.lstrip("\n")
            return prompt + closed + text[at:].lstrip("\n")
        raise RowError(
            f"message {i}: the template writes another text before an answer than when it is asked for one "
            f"(which ends with {prompt[-40:]!r}), so that it would be trained in a context that generation never has"
        )

    def _after(self, i: int, text: str, begin: int, prompt: str) -> int | None:
        """Where in ``text[:begin]`` the end of ``prompt`` ends, as much of it as there is; None if it is not there."""
        length = len(prompt)
        while length >= min(_LEAST, len(prompt)) and length:
            at = text.rfind(prompt[-length:], 0, begin)
            if at >= 0:
                others = [message.get("content", "").strip() for message in self._messages[:i]]
                between = text[at + length : begin]
                return None if any(words and words in between for words in others) else at + length
            length = length // 2 if length > _LEAST else 0
        return None

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


def _account(
    template: ChatTemplate, text: str, messages: list[Message], turns: dict[int, Span], notes: Counter[str]
) -> tuple[list[tuple[str, Span]], bool]:
    """Prove that each turn has its own words and none of another message.

    Returns:
        Where words were found, and whether it is certain that no part of the conversation is left out: each message has
        nothing but words, which are too many to be met by chance, and stand in their order.

    Raises:
        RowError: a trained turn lacks its own words, or has those of another message.
    """
    found: list[tuple[str, Span]] = []
    begins = sorted(turns.values())
    at, is_certain = 0, True
    for i, message in enumerate(messages):
        words = message.get("content", "").strip()
        is_long = len(words) >= _CERTAIN and words not in template.source
        is_certain &= message.keys() <= _PLAIN and (i in turns or not words or is_long)
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
        is_certain = False
        outside, rest = [], 0
        for begin, end in begins:
            outside.append(text[rest:begin])
            rest = end
        if any(words in part for part in [*outside, text[rest:]]):
            continue  # a system message may be moved
        if any(words in text[begin:end] for begin, end in begins):
            raise RowError(f"message {i} ({message['role']}): its words are in a trained answer and nowhere else")
        notes[f"{message['role']} messages that the template does not write word by word"] += 1
    return found, is_certain


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
