"""A chat template, rendered as transformers renders it: sandboxed, with the marks of what is generated."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from sft_jax.config import SET_BY_RENDERING
from sft_jax.data.read.rows import Message, RowError
from sft_jax.errors import UserError

_rendering = threading.Lock()  # a compiled template keeps the marks of the one text it is writing
SECONDS = 10.0  # that rendering one conversation may take
Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """The template of one tokenizer.

    Rendering goes through transformers' own function, so that the text is the one ``apply_chat_template`` tokenises.

    Args:
        source: Jinja.
        special_tokens: what the template knows as ``bos_token``, ``eos_token``, …
        today: what ``strftime_now`` tells, YYYY-MM-DD; default the day it is.
    """

    source: str
    special_tokens: dict[str, Any] = field(default_factory=dict)
    today: str | None = None

    @cached_property
    def tells_the_day(self) -> bool:
        """Whether what it writes depends on the day, by ``strftime_now`` (Llama 3.2's does)."""
        return "strftime_now" in self.source

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names of the variables that it reads."""
        with suppress(jinja2.TemplateSyntaxError):
            parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", self.source))
            return frozenset(jinja2.meta.find_undeclared_variables(parsed))
        return frozenset(re.findall(r"[A-Za-z_]\w*", self.source))

    def check_kwargs(self, given: Mapping[str, Any]) -> None:
        """Refuse arguments that are not for a row or a config to give.

        Raises:
            RowError: one of them.
        """
        for name in given:
            if name in SET_BY_RENDERING or name in self.special_tokens or name == "strftime_now":
                raise RowError(f"chat template argument {name!r} is set by what is rendered, and not by hand")

    @cached_property
    def is_marked(self) -> bool:
        """Whether the template says itself what an assistant generates, with ``{% generation %}``."""
        return _GENERATION.search(self.source) is not None

    @cached_property
    def generation_prompt(self) -> str:
        """What it writes to make the assistant answer; empty where that cannot be told by itself."""
        asked: list[Message] = [{"role": "user", "content": "\u2603"}]
        try:
            (text, _), (prompted, _) = self.render(asked), self.render(asked, prompt=True)
        except RowError:
            return ""
        return prompted[len(text) :] if prompted.startswith(text) else ""

    @cached_property
    def _dated(self) -> str:
        """With a ``strftime_now`` of its own, which tells ``today``: transformers lets nobody pass a function."""
        if self.today is None or not self.tells_the_day:
            return self.source
        day = datetime.fromisoformat(self.today)
        told = "format"
        for directive in sorted(set(re.findall("%-?[a-zA-Z]", self.source))):
            told += f" | replace({json.dumps(directive)}, {json.dumps(day.strftime(directive))})"
        # The empty text keeps jinja from taking the template's first line break for the macro's last.
        return f"{{% macro strftime_now(format) %}}{{{{ {told} }}}}{{% endmacro %}}{{{{ '' }}}}{self.source}"

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and where the template marks it as generated.

        Args:
            prompt: end with what makes the assistant answer.
            kwargs: further arguments of the template.

        Raises:
            RowError: the template refuses the messages, or fails.
            UserError: it does not come to an end; other rows would not fare better.
        """
        if not messages:
            raise RowError("the conversation has no messages")
        render: Any = render_jinja_template  # its annotations are narrower than what it takes
        try:
            with _rendering, _time_limit(SECONDS):
                texts, marks = render(
                    [messages],
                    tools=tools,
                    chat_template=self._dated,
                    return_assistant_tokens_mask=self.is_marked,
                    add_generation_prompt=prompt,
                    **self.special_tokens,
                    **(kwargs or {}),
                )
            texts[0].encode()  # templates may put together what JSON has escaped
        except TimeoutError as error:
            raise UserError(
                f"the chat template does not come to an end within {SECONDS:g} seconds for a conversation of "
                f"{len(messages)} messages; give another one in data.chat_template"
            ) from error
        except UnicodeEncodeError as error:
            raise RowError("the conversation has half of a character (a lone surrogate)") from error
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:  # whatever a template stumbles over is the row's fault or its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RowError(f"the chat template fails: {reason}") from error
        return texts[0], sorted(marks[0]) if marks else []


@dataclass(frozen=True)
class ChatTemplates:
    """All templates of one tokenizer, chosen between as transformers does: ``tool_use`` for what has tools.

    Args:
        sources: Jinja by name; one alone is the ``default``.
    """

    sources: dict[str, str]
    special_tokens: dict[str, Any] = field(default_factory=dict)
    today: str | None = None

    @classmethod
    def of(cls, tokenizer: Any, today: str | None = None) -> ChatTemplates | None:
        """Those of a tokenizer; None if it has none."""
        given = tokenizer.chat_template
        if not given:
            return None
        return cls(given if isinstance(given, dict) else {"default": given}, dict(tokenizer.special_tokens_map), today)

    @cached_property
    def all(self) -> dict[str, ChatTemplate]:
        """Each of them by name."""
        return {name: ChatTemplate(text, self.special_tokens, self.today) for name, text in self.sources.items()}

    @cached_property
    def tells_the_day(self) -> bool:
        """Whether what any of them writes depends on the day."""
        return any(template.tells_the_day for template in self.all.values())

    def choose(self, has_tools: bool) -> ChatTemplate:
        """The one for a conversation.

        Raises:
            UserError: none of them is for it.
        """
        name = "tool_use" if has_tools and "tool_use" in self.all else "default"
        if name not in self.all:
            raise UserError(
                f"data.chat_template: the tokenizer has the templates {', '.join(self.all)} and none is the default; "
                "give a Jinja file"
            )
        return self.all[name]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after some seconds, inside :func:`can_be_interrupted`; elsewhere there is no limit."""
    if not _armed or not _is_main_thread():
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


_armed: list[bool] = []


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def can_be_interrupted() -> Iterator[None]:
    """Let templates that do not come to an end be stopped; works in the main thread of a process only."""
    if _armed or not _is_main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    _armed.append(True)
    try:
        yield
    finally:
        _armed.pop()
        signal.signal(signal.SIGALRM, before)
