"""Adapts a conversation to the form that a template expects."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from sft_jax.data.chat.seen import Tools, find_omitted, list_parts
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.chat.thoughts import rename_reasoning_key
from sft_jax.data.read.rows import Conversation, Message, RowError


def adapt_to_template(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """Convert a conversation to the form that a template expects.

    Renames the reasoning key, passes tool call arguments as objects or as JSON text, and turns ``developer`` messages
    into ``system`` messages if the template does not support the ``developer`` role.
    """
    messages = [rename_reasoning_key(message, template.source) for message in conversation.messages]
    conversation = replace(conversation, messages=messages)
    if any("tool_calls" in message for message in messages) and not _renders_objects(template, conversation):
        as_text = replace(conversation, messages=[_with_text_arguments(message) for message in messages])
        with suppress(RowError):
            template.render(as_text.messages, as_text.tools, kwargs=as_text.template_kwargs)
            conversation = as_text
    if any(message["role"] == "developer" for message in messages):
        as_system = [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in conversation.messages
        ]
        if not _supports_developer(template, conversation):
            conversation = replace(conversation, messages=as_system)
    return conversation


def _renders_objects(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether the template writes arguments that are objects as JSON, and not as the ``repr`` of a dict."""
    try:
        text = template.render(conversation.messages, conversation.tools, kwargs=conversation.template_kwargs)[0]
    except RowError:
        return False
    calls = [call for message in conversation.messages for call in message.get("tool_calls", ())]
    arguments = [call["function"]["arguments"] for call in calls]
    return not any(one and str(one) in text and str(one) != json.dumps(one) for one in arguments)


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments.text or json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def _supports_developer(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether the template writes the content of ``developer`` messages."""
    messages = conversation.messages
    numbers = [i for i, message in enumerate(messages) if message["role"] == "developer"]
    parts = [part for part in list_parts(messages, None) if part.path[1] in numbers and part.path[2] == "content"]

    def render(messages: list[Message], tools: Tools) -> str:
        return template.render(messages, tools, kwargs=conversation.template_kwargs)[0]

    try:
        return not find_omitted(render, messages, conversation.tools, parts)
    except RowError:  # the template rejects the role
        return False
