"""Locates the supervised turns of a conversation in its rendered text, and checks their context against inference.

At inference, a model answers after the rendered earlier messages and the generation prompt. An answer is supervised
only in a text that begins with exactly this prompt. If the template rewrites earlier turns once later ones follow
(Qwen3 removes their reasoning), the conversation is split into several texts, each ending with an answer. If it renders
even the prompt differently once the answer follows, the text is built from the prompt and the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sft_jax.data.chat.forms import adapt_to_template
from sft_jax.data.chat.local import find_local
from sft_jax.data.chat.seen import Tools, find_omitted, list_parts
from sft_jax.data.chat.template import ChatTemplate, ChatTemplates, Span
from sft_jax.data.chat.thoughts import openings, reasoning_of
from sft_jax.data.chat.verify import verify_turns
from sft_jax.data.read.rows import Conversation, Message, RowError

_MAX_RENDERED = 400_000  # messages that are rendered for one conversation; takes about five seconds
_MIN_PROMPT = 4  # characters that are enough to recognize the end of a generation prompt


@dataclass(frozen=True)
class Rendered:
    """One text to train on, and the positions of its messages.

    Args:
        turns: character span of each supervised message, by the number of the message.
        contents: role and character span of every message whose content was located.
        is_marked: whether the turns are ``{% generation %}`` blocks of the template.
    """

    text: str
    turns: dict[int, Span]
    contents: list[tuple[str, Span]]
    notes: Counter[str] = field(default_factory=Counter)
    is_marked: bool = False


class TurnFinder:
    """Locates turns with the chat templates of one tokenizer.

    Args:
        special_tokens: texts of the tokens that may end a turn.
    """

    def __init__(self, templates: ChatTemplates, special_tokens: Collection[str]):
        self._templates = templates
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")

    def find(self, conversation: Conversation, supervised: list[int]) -> tuple[list[Rendered], set[str]]:
        """Render a conversation as one text, or as several if no single text has every turn in its inference context.

        Args:
            supervised: numbers of the supervised messages, ascending; at least one.

        Returns:
            The texts, and the names of keys that the template uses in none of them.

        Raises:
            RowError: the template fails, omits a part, or renders a turn that cannot be verified.
            UserError: the tokenizer has no template for such conversations.
        """
        template = self._templates.choose(bool(conversation.tools))
        template.check_kwargs(conversation.template_kwargs)
        conversation = adapt_to_template(template, conversation)
        prefixes = Prefixes(template, conversation, self._special)
        texts: list[Rendered] = []
        unread = {f"chat_template_kwargs.{name}" for name in conversation.template_kwargs.keys() - template.reads}
        read: set[str] = set()
        remaining, size = list(supervised), len(conversation.messages)
        while remaining:
            text, marks = prefixes.text(size, remaining)
            spans = find_local(prefixes, remaining, text, size)
            if spans is None:
                spans = {i: span for i in remaining if (span := prefixes.whole(i, text, size)) is not None}
            turns = prefixes.marked(spans, text, marks, size)
            if turns:
                contents, is_complete = verify_turns(
                    template, text, conversation.messages[:size], turns, prefixes.notes
                )
                if conversation.tools or not is_complete:
                    omitted, used = prefixes.check_omitted(size, max(turns))
                    unread |= omitted
                    read |= used
                texts.append(Rendered(text, turns, contents, prefixes.notes, template.is_marked))
                prefixes.notes = Counter()
                remaining = [i for i in remaining if i not in turns]
            if remaining:
                size = remaining[-1] + 1
        if len(texts) > 1:
            texts[0].notes["conversations split, because the template rewrites earlier turns"] += 1
        return texts[::-1], unread - read


class Prefixes:
    """Renders prefixes of one conversation, each once."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, special: re.Pattern[str]):
        self._template, self._special = template, special
        self._messages, self._tools = conversation.messages, conversation.tools
        self._kwargs = conversation.template_kwargs
        self._texts: dict[int, tuple[str, list[Span]]] = {}
        self._answers: dict[int, tuple[str, int]] = {}
        self._built: set[int] = set()
        self._num_rendered = 0  # messages
        self.notes: Counter[str] = Counter()

    def _render(self, messages: list[Message], tools: Tools, prompt: bool = False) -> tuple[str, list[Span]]:
        self._num_rendered += len(messages)
        if self._num_rendered > _MAX_RENDERED:
            raise RowError(
                f"has {len(self._messages):,} messages, too many to locate its answers in what the template writes; "
                "split the conversation"
            )
        return self._template.render(messages, tools, prompt, self._kwargs)

    def window(self, numbers: Sequence[int], prompt: bool = False) -> str:
        """Render some of the messages, by their numbers."""
        return self._render([self._messages[i] for i in numbers], self._tools, prompt)[0]

    @property
    def roles(self) -> list[str]:
        """The roles of all messages."""
        return [message["role"] for message in self._messages]

    def rendered(self, size: int) -> tuple[str, list[Span]]:
        """Render the first ``size`` messages; also returns the template's ``{% generation %}`` spans."""
        if size not in self._texts:
            self._texts[size] = self._render(self._messages[:size], self._tools)
        return self._texts[size]

    def text(self, size: int, supervised: Collection[int]) -> tuple[str, list[Span]]:
        """Return the training text of the first ``size`` messages, and the template's ``{% generation %}`` spans."""
        text, marks = self.rendered(size)
        return (self._answer(size - 1)[0], marks) if size - 1 in supervised else (text, marks)

    def whole(self, i: int, text: str, size: int) -> Span | None:
        """Locate message ``i`` in the ``text`` of ``size`` messages; None if its context differs at inference."""
        prefix, begin = self._answer(i)
        end = len(text) if i + 1 == size else self._end_in(text, prefix)
        return None if end is None else (begin, end)

    def marked(self, spans: dict[int, Span], text: str, marks: list[Span], size: int) -> dict[int, Span]:
        """Replace the spans of messages by those of the template's ``{% generation %}`` blocks, if it has any."""
        if not self._template.is_marked or not spans:
            return spans
        of_answers = self._by_answer(marks, size)
        prompt = self._template.generation_prompt
        if num := sum(text.startswith(prompt, of_answers[i][0]) for i in spans if prompt):
            self.notes["supervised turns that include the turn header, because {% generation %} does"] += num
        return {i: of_answers[i] for i in spans}

    def check_omitted(self, size: int, last: int) -> tuple[set[str], set[str]]:
        """Return the names of optional parts that the text of ``size`` messages omits, and of those that it contains.

        Args:
            last: the last supervised message of the text; required parts may be missing after it.

        Raises:
            RowError: the text omits a required part.
        """
        is_built = last == size - 1 and last in self._built
        stop = last if is_built else size
        parts = list_parts(self._messages[:stop], self._tools)

        def render(messages: list[Message], tools: Tools) -> str:
            return self._render(messages, tools, prompt=is_built)[0]

        omitted = find_omitted(render, self._messages[:stop], self._tools, parts)
        for part in omitted:
            if part.is_required and not (part.path[0] == "messages" and part.path[1] > last):
                roles = ", ".join(dict.fromkeys(message["role"] for message in self._messages))
                remedy = (
                    f"ignore it with data.*.ignore_columns: [{part.path[0]}]"
                    if part.path[0] == "tools"
                    else f"remove it from the row (roles in this row: {roles})"
                )
                raise RowError(f"{part}; use a template that does, or {remedy}")
        names = {part.name for part in omitted if not part.is_required}
        return names, {part.name for part in parts if not part.is_required} - names

    def _answer(self, i: int) -> tuple[str, int]:
        """Return the text up to and including message ``i``, in its inference context, and where the message begins."""
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
                f"message {i}: the template renders the preceding messages differently with the generation prompt, so "
                "the training context would never occur at inference; use a template without {% generation %} blocks, "
                "whose turns are located by rendering"
            )
        self._built.add(i)
        return self._built_after(i, prompt, text), len(prompt)

    def _own_begin(self, i: int, text: str) -> int:
        """Find where the text starts to depend on the content of message ``i``; spaces before a word belong to it."""
        other = {"role": self._messages[i]["role"], "content": "\u2603"}
        begin = _common(text, self._render([*self._messages[:i], other], self._tools)[0])
        return len(text[:begin].rstrip(" "))

    def _built_after(self, i: int, prompt: str, text: str) -> str:
        """Join the generation prompt and the answer at the end of ``text``.

        A template may move or merge messages, or omit reasoning, once an answer follows. The answer is then taken from
        its own rendering, after the end of the generation prompt.
        """
        begin = self._own_begin(i, text)
        at = self._after(i, text, begin, prompt)
        if at is not None:
            self.notes["answers moved after the generation prompt, because the template renders it differently"] += 1
            return prompt + text[at:]
        reasoning = reasoning_of(self._messages[i])
        for opening in openings(prompt):
            at = self._after(i, text, begin, opening.stem)
            if at is None:
                continue
            if opening.end is None:
                if reasoning.strip():
                    raise RowError(
                        f"message {i}: it has reasoning, but the generation prompt closes the reasoning block; change "
                        "that with data.template_kwargs, or set data.reasoning=exclude"
                    )
                self.notes["answers moved after the reasoning block that the generation prompt closes"] += 1
                return prompt + text[at:]
            if not reasoning.strip():
                self.notes[
                    "answers without reasoning, given an empty block because the generation prompt opens it"
                ] += 1
            closed = reasoning.strip("\n") + opening.end
            if prompt.endswith("\n"):  # two line breaks could be another token than the one at inference
                closed = closed.lstrip("\n")
            return prompt + closed + text[at:].lstrip("\n")
        raise RowError(
            f"message {i}: the template renders another context before an answer than the generation prompt, which "
            f"ends with {prompt[-40:]!r}, so the training context would never occur at inference"
        )

    def _after(self, i: int, text: str, begin: int, prompt: str) -> int | None:
        """Search ``text[:begin]`` for ever shorter suffixes of ``prompt``; returns where the match ends, or None."""
        length = len(prompt)
        while length >= min(_MIN_PROMPT, len(prompt)) and length:
            at = text.rfind(prompt[-length:], 0, begin)
            if at >= 0:
                others = [message.get("content", "").strip() for message in self._messages[:i]]
                between = text[at + length : begin]
                return None if any(words and words in between for words in others) else at + length
            length = length // 2 if length > _MIN_PROMPT else 0
        return None

    def _by_answer(self, marks: list[Span], size: int) -> dict[int, Span]:
        """Return the ``{% generation %}`` span of each answer among the first ``size`` messages."""
        answers = [j for j, message in enumerate(self._messages[:size]) if message["role"] == "assistant"]
        marks = [mark for mark in marks if mark[1] > mark[0]]
        if len(marks) > len(answers):  # join adjacent spans
            joined: list[Span] = []
            for begin, end in marks:
                if joined and joined[-1][1] == begin:
                    joined[-1] = (joined[-1][0], end)
                else:
                    joined.append((begin, end))
            marks = joined
        if len(marks) != len(answers):
            raise RowError(f"the template renders {len(marks)} {{% generation %}} blocks for {len(answers)} answers")
        return dict(zip(answers, marks, strict=True))

    def _end_in(self, text: str, prefix: str) -> int | None:
        """Return where ``prefix`` ends in ``text``, or None if ``text`` does not start with it.

        Special tokens at the end of ``prefix`` may be missing, all but one: ``<|end|><|eos|>`` may be ``<|end|>``.
        """
        if text.startswith(prefix):
            return len(prefix)
        cut = len(prefix)
        specials = list(self._special.finditer(prefix))
        while len(specials) > 1 and not prefix[specials[-1].end() : cut].strip():
            cut = specials.pop().start()
            if prefix[specials[-1].end() : cut].strip():
                return None
            if text.startswith(prefix[:cut]):
                return cut
        return None


def _common(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
