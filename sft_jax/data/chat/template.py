"""Renders chat templates as transformers does: sandboxed, with the spans of ``{% generation %}`` blocks."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from sft_jax.config.data import RESERVED_TEMPLATE_KWARGS
from sft_jax.data.chat.template_limits import (
    FREE_CHARACTERS,
    GENERATION,
    MOST_GROWTH,
    OutOfBounds,
    check_source,
    limited,
    parse,
)
from sft_jax.data.read.rows import Message, RowError
from sft_jax.errors import UserError

_rendering = threading.Lock()  # a compiled template stores the generation spans of the text that it is rendering
Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """One chat template.

    Renders with the function that ``apply_chat_template`` of transformers calls, so the text is the same.

    Args:
        source: Jinja source.
        special_tokens: the variables ``bos_token``, ``eos_token``, … of the template.
        today: date used by ``strftime_now``, YYYY-MM-DD; default the current date.
    """

    source: str
    special_tokens: dict[str, Any] = field(default_factory=dict)
    today: str | None = None

    @cached_property
    def uses_date(self) -> bool:
        """Whether the template uses ``strftime_now``, as that of Llama 3.2 does."""
        return "strftime_now" in self.source

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names of the variables that the template reads."""
        check_source(self.source)
        with suppress(jinja2.TemplateSyntaxError, RecursionError):  # rendering says what is wrong
            return frozenset(jinja2.meta.find_undeclared_variables(parse(self.source)))
        return frozenset(re.findall(r"[A-Za-z_]\w*", self.source))

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Check the template arguments of a row or a config.

        Raises:
            RowError: an argument is reserved for rendering.
        """
        for name in kwargs:
            if name in RESERVED_TEMPLATE_KWARGS or name in self.special_tokens or name == "strftime_now":
                raise RowError(f"chat template argument {name!r} is set by the renderer and cannot be overridden")

    @cached_property
    def is_marked(self) -> bool:
        """Whether the template marks assistant turns with ``{% generation %}`` blocks."""
        return GENERATION.search(self.source) is not None

    @cached_property
    def generation_prompt(self) -> str:
        """The text that ``add_generation_prompt`` appends; empty if it cannot be separated from the messages."""
        messages: list[Message] = [{"role": "user", "content": "\u2603"}]
        try:
            (text, _), (prompted, _) = self.render(messages), self.render(messages, prompt=True)
        except RowError:
            return ""
        return prompted[len(text) :] if prompted.startswith(text) else ""

    @cached_property
    def _dated(self) -> str:
        """The source with a ``strftime_now`` macro for ``today``; transformers does not accept a function."""
        check_source(self.source)
        if self.today is None or not self.uses_date:
            return self.source
        date = datetime.fromisoformat(self.today)
        expression = "format"
        for directive in sorted(set(re.findall("%-?[a-zA-Z]", self.source))):
            expression += f" | replace({json.dumps(directive)}, {json.dumps(date.strftime(directive))})"
        # Without the empty expression, trim_blocks of Jinja would remove a line break at the start of the template.
        return f"{{% macro strftime_now(format) %}}{{{{ {expression} }}}}{{% endmacro %}}{{{{ '' }}}}{self.source}"

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Render a conversation.

        Args:
            prompt: whether to append the generation prompt.
            kwargs: further arguments of the template.

        Returns:
            The text, and the character spans of its ``{% generation %}`` blocks.

        Raises:
            RowError: the template rejects the messages, or fails.
            UserError: rendering exceeds a limit of :mod:`~sft_jax.data.chat.template_limits`.
        """
        if not messages:
            raise RowError("the conversation has no messages")
        source = self._dated
        render: Any = render_jinja_template  # its type annotations are too narrow
        try:
            with _rendering, limited():
                texts, marks = render(
                    [messages],
                    tools=tools,
                    chat_template=source,
                    return_assistant_tokens_mask=self.is_marked,
                    add_generation_prompt=prompt,
                    **self.special_tokens,
                    **(kwargs or {}),
                )
            texts[0].encode()  # nested values, such as tool call arguments, may contain lone surrogates
        except OutOfBounds as error:
            raise UserError(
                f"the chat template {error} for a conversation of {len(messages)} messages; set data.chat_template to "
                "another one"
            ) from error
        except UnicodeEncodeError as error:
            raise RowError("the conversation contains a lone surrogate, which is not valid text") from error
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            SyntaxError,  # of the program that Jinja writes, where loops nest too deeply
            TypeError,
            ValueError,
        ) as error:  # the exceptions that a row or a template can cause
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RowError(f"the chat template fails: {reason}") from error
        if len(texts[0]) > FREE_CHARACTERS:
            read, written = len(json.dumps([messages, tools, kwargs], default=str)), len(texts[0])
            if written > FREE_CHARACTERS + MOST_GROWTH * read:
                texts.clear()  # an error keeps what this function holds, and each row has one
                raise RowError(f"the chat template writes {written:,} characters for a conversation of {read:,}")
        return texts[0], sorted(marks[0]) if marks else []


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of one tokenizer. As in transformers, ``tool_use`` is used for conversations with tools.

    Args:
        sources: Jinja sources by name; a single template is named ``default``.
    """

    sources: dict[str, str]
    special_tokens: dict[str, Any] = field(default_factory=dict)
    today: str | None = None

    @classmethod
    def of(cls, tokenizer: Any, today: str | None = None) -> ChatTemplates | None:
        """Return the templates of a tokenizer; None if it has none."""
        source = tokenizer.chat_template
        if not source:
            return None
        sources = source if isinstance(source, dict) else {"default": source}
        return cls(sources, dict(tokenizer.special_tokens_map), today)

    @cached_property
    def all(self) -> dict[str, ChatTemplate]:
        """The templates by name."""
        return {name: ChatTemplate(text, self.special_tokens, self.today) for name, text in self.sources.items()}

    @cached_property
    def uses_date(self) -> bool:
        """Whether any of the templates uses ``strftime_now``."""
        return any(template.uses_date for template in self.all.values())

    def choose(self, has_tools: bool) -> ChatTemplate:
        """Return the template for a conversation with or without tools.

        Raises:
            UserError: there is no such template.
        """
        name = "tool_use" if has_tools and "tool_use" in self.all else "default"
        if name not in self.all:
            raise UserError(
                f"data.chat_template: the tokenizer has the templates {', '.join(self.all)} but no default; set it to "
                "a Jinja file"
            )
        return self.all[name]
