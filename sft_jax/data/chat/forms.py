"""Forms of the same conversation of which a template reads one."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from sft_jax.data.chat.seen import Tools, parts_of, unseen
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.chat.thoughts import with_known_key
from sft_jax.data.read.rows import Conversation, Message, RowError


def in_form(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """A conversation in the form that a template reads.

    Thoughts under the key it knows; arguments of calls as objects, or as the JSON text that it joins to other text; and
    what a developer says as what the system says, where the template knows no developer.
    """
    messages = [with_known_key(message, template.source) for message in conversation.messages]
    conversation = replace(conversation, messages=messages)
    if any("tool_calls" in message for message in messages) and not _renders_objects(template, conversation):
        as_text = replace(conversation, messages=[_with_text_arguments(message) for message in messages])
        with suppress(RowError):
            template.render(as_text.messages, as_text.tools, kwargs=as_text.template_kwargs)
            conversation = as_text
    if any(message["role"] == "developer" for message in messages):
        known = [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in conversation.messages
        ]
        if not _knows_developers(template, conversation):
            conversation = replace(conversation, messages=known)
    return conversation


def _renders_objects(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether arguments that are objects are written as JSON, and not as Python shows a dict."""
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


def _knows_developers(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether the template writes what a developer says."""
    messages = conversation.messages
    said = [i for i, message in enumerate(messages) if message["role"] == "developer"]
    parts = [part for part in parts_of(messages, None) if part.where[1] in said and part.where[2] == "content"]

    def render(messages: list[Message], tools: Tools) -> str:
        return template.render(messages, tools, kwargs=conversation.template_kwargs)[0]

    try:
        return not unseen(render, messages, conversation.tools, parts)
    except RowError:  # it refuses the role
        return False
