"""Parts of a conversation that a template leaves out: the row is refused and the part named; and forms it wants."""

import json

import pytest
from kit import CHATML, CHATML_UNMARKED

from sft_jax.data.chat.encoder import Encoder
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.errors import UserError

pytestmark = pytest.mark.smoke

# Writes what it knows, as published templates do, and leaves out the rest without a word.
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'tool'] %}{{ m.role + ':' + m.content + '\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'assistant:' }}"
    "{% if m.thinking and loop.last %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
AS_OBJECT = "{{ call.function.name + (call.function.arguments | tojson) }}"
AS_TEXT = "{{ call.function.name + call.function.arguments }}"
AS_EITHER = "{{ call.function.name ~ call.function.arguments }}"  # an object as Python shows it


def message(role, content="", **more):
    return {"role": role, "content": content, **more}


def call(name="tide", arguments=None):
    return {
        "type": "function",
        "function": {"name": name, "arguments": {"at": "Brest"} if arguments is None else arguments},
    }


def text_of(tokenizer, template, messages, **more):
    """The whole text of a conversation."""
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer)
    (result,) = encoder.encode([parse("messages", {"messages": messages, **more})])
    if isinstance(result, RowError):
        raise result
    return tokenizer.decode(result[-1].ids)


@pytest.mark.parametrize("words", ["river", "assistant", "a question that is long enough to be met by no chance"])
@pytest.mark.parametrize("role", ["critic", "context", "narrator"])
def test_a_role_that_is_dropped(tokenizer, role, words):
    with pytest.raises(
        RowError,
        match=f"message 0: the template does not write its content .role '{role}'.*roles in this row: {role}, user",
    ):
        text_of(tokenizer, KNOWN_ROLES, [message(role, words), message("user", "river"), message("assistant", "bread")])
    assert words in text_of(
        tokenizer, CHATML, [message(role, words), message("user", "river"), message("assistant", "bread")]
    )


@pytest.mark.parametrize("words", ["river", "Be brief in everything that you say."])
def test_a_developer_is_the_system_where_the_template_knows_none(tokenizer, words):
    messages = [message("developer", words), message("user", "river"), message("assistant", "bread")]
    assert text_of(tokenizer, KNOWN_ROLES, messages) == f"system:{words}\nuser:river\nassistant:bread<|im_end|>\n"
    assert text_of(tokenizer, CHATML, messages).startswith(f"<|im_start|>developer\n{words}<|im_end|>")


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ("prompter", "user"), ("Human", "user"), (" USER ", "user"), ("gpt", "assistant"), ("Model", "assistant"),
        ("bot", "assistant"), ("ASSISTANT", "assistant"), ("observation", "tool"), ("tool_response", "tool"),
        ("function", "tool"), ("System", "system"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["role", "from"])
def test_roles_in_other_words(given, role, key):
    messages = [{key: given, "content": "a"}, {"role": "assistant", "content": "b"}]
    assert parse("messages", {"messages": messages}).messages[0] == message(role, "a")


def test_calls_in_other_words():
    as_json = json.dumps({"name": "tide", "arguments": {"at": "Brest"}})
    forms = [
        {"from": "tool_call", "value": as_json},
        {"role": "Function_Call", "content": as_json},
        message("assistant", None, function_call={"name": "tide", "arguments": '{"at": "Brest"}'}),
        message("gpt", None, tool_calls=[call(arguments='{"at": "Brest"}')]),
        message("assistant", None, tool_calls=json.dumps([call()])),
    ]
    for one in forms:
        (found,) = parse("messages", {"messages": [one]}).messages
        assert found == {"role": "assistant", "tool_calls": [call()]}
    with pytest.raises(RowError, match="has both 'function_call' and 'tool_calls'; keep one"):
        parse("messages", {"messages": [forms[2] | {"tool_calls": [call()]}]})
    with pytest.raises(RowError, match="only assistant messages can call tools"):
        parse("messages", {"messages": [message("user", "a", tool_calls=[call()])]})


@pytest.mark.parametrize("arguments", [{"at": "Brest"}, {}, {"at": 7}])
def test_the_second_of_two_calls(tokenizer, arguments):
    template = KNOWN_ROLES.replace("CALL", "{% if loop.first %}" + AS_OBJECT + "{% endif %}")
    messages = [message("user", "river"), message("assistant", "", tool_calls=[call(), call(arguments=arguments)])]
    with pytest.raises(RowError, match=r"message 1: the template does not write its call of 'tide' \(call 1\)"):
        text_of(tokenizer, template, messages)
    assert text_of(tokenizer, KNOWN_ROLES.replace("CALL", AS_OBJECT), messages).count("tide") == 2


def test_a_schema(tokenizer):
    tools = [{"name": name, "description": f"Tells the {name}."} for name in ("tide", "moon")]
    messages = [message("user", "river"), message("assistant", "bread")]
    for template in (KNOWN_ROLES, "{{ tools[0] | tojson }}" + KNOWN_ROLES):
        with pytest.raises(RowError, match=r"does not write the schema of the tool '\w+'; .*ignore_columns: \[tools\]"):
            text_of(tokenizer, template, messages, tools=tools)
    assert "Tells the moon." in text_of(tokenizer, "{{ tools | tojson }}" + KNOWN_ROLES, messages, tools=tools)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought(tokenizer, key):
    """Under the key that the template reads; where it reads none, the thought is missed."""
    messages = [message("user", "river"), message("assistant", "bread", **{key: "flour and water"})]
    assert "<think>flour and water</think>bread" in text_of(tokenizer, KNOWN_ROLES, messages)
    with pytest.raises(RowError, match=f"message 1: the template does not write its {key}"):
        text_of(tokenizer, CHATML_UNMARKED, messages)


@pytest.mark.parametrize("form", [AS_OBJECT, AS_TEXT, AS_EITHER])
@pytest.mark.parametrize("given", [{"at": "Brest", "in": None}, '{"at": "Brest", "in": null}'])
def test_arguments_in_the_form_that_a_template_writes(tokenizer, form, given):
    messages = [message("user", "river"), message("assistant", "", tool_calls=[call(arguments=given)])]
    assert 'tide{"at": "Brest", "in": null}' in text_of(tokenizer, KNOWN_ROLES.replace("CALL", form), messages)


def test_one_of_several_templates_is_chosen_as_transformers_does(tokenizer):
    tools = [{"type": "function", "function": {"name": "tide", "description": "Tells the tide."}}]
    messages = [message("user", "river"), message("assistant", "bread")]
    templates = {"default": KNOWN_ROLES, "tool_use": "{{ tools | tojson }}" + KNOWN_ROLES}
    for more in ({}, {"tools": tools}):
        text = text_of(tokenizer, templates, messages, **more)
        assert text == tokenizer.apply_chat_template(messages, tokenize=False, **more)
    with pytest.raises(UserError, match="has the templates tool_use, rag but no default"):
        text_of(tokenizer, {"tool_use": KNOWN_ROLES, "rag": KNOWN_ROLES}, messages)


@pytest.mark.parametrize("where", ["content", "reasoning_content", "arguments"])
@pytest.mark.parametrize("words", ["{} and nothing after it", "The end.{}", "{}"])
def test_any_token_that_generation_stops_at(tokenizer, where, words):
    """In an answer, its thought or its call: refused; in what is only read: not."""
    words = words.format("<|endoftext|>")
    last = message("assistant", "bread", reasoning_content="so", tool_calls=[call()])
    template = KNOWN_ROLES.replace("CALL", AS_OBJECT).replace("m.thinking", "m.reasoning_content")
    good = [message("user", words), last]
    for stop_ids in ((), (0,)):
        tokenizer.chat_template = template
        bad = [
            good[0],
            last | ({"tool_calls": [call(arguments={"at": words})]} if where == "arguments" else {where: words}),
        ]
        for messages, is_refused in ((good, False), (bad, bool(stop_ids))):
            (result,) = Encoder(tokenizer, stop_ids=stop_ids).encode([parse("messages", {"messages": messages})])
            assert isinstance(result, RowError) == is_refused, result
            assert not is_refused or "the answer contains the stop token '<|endoftext|>'" in str(result)


@pytest.mark.parametrize("text", ["a <|endoftext|> b", "<|endoftext|>", "a<|im_end|> b"])
def test_documents_that_hold_a_stop_token(tokenizer, text):
    encoder = Encoder(tokenizer, stop_ids=(0,))
    for row_format, row in (("text", {"text": text}), ("prompt-completion", {"prompt": "q", "completion": text})):
        (result,) = encoder.encode([parse(row_format, row)])
        assert "the text contains the stop token" in str(result)
    (result,) = encoder.encode([parse("prompt-completion", {"prompt": text, "completion": "a"})])
    assert not isinstance(result, RowError)
    (result,) = encoder.encode([parse("text", {"text": "a river<|im_end|>"})])  # it ends with what ends it
    assert result[0].ids.tolist().count(2) == 1


def test_a_chat_in_plain_text_is_noted(tokenizer):
    encoder = Encoder(tokenizer)
    text = "<|im_start|>user\nriver<|im_end|>\n<|im_start|>assistant\nbread<|im_end|>"
    (result,) = encoder.encode([parse("text", {"text": text})])
    assert not isinstance(result, RowError)
    note = "plain texts with chat template tokens (<|im_start|>), every token supervised"
    assert encoder.tally.notes[note] == 1


@pytest.mark.parametrize("marks", [("{% generation %}", "{% endgeneration %}"), ("", "")])
def test_nothing_behind_the_stop_token_is_trained(tokenizer, marks):
    """Not a second special token, and not the next turn's header, which is no end of an answer at all."""
    opened, closed = marks
    messages = [message("user", "river"), message("assistant", "bread")]
    for ending, trained in (("<|endoftext|>\n", "bread<|im_end|>"), ("\n", "bread<|im_end|>\n"), ("\nuser:", None)):
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}" + opened + "{{ m.content + '<|im_end|>"
            f"{ending}' }}}}{closed}{{% else %}}{{{{ m.content + '\n' }}}}{{% endif %}}{{% endfor %}}"
        )
        (result,) = Encoder(tokenizer).encode([parse("messages", {"messages": messages})])
        if trained is None:
            assert "the answer does not end with a stop token" in str(result)
            continue
        (one,) = result
        found = tokenizer.decode([token for token, weight in zip(one.ids, one.mask, strict=True) if weight])
        assert found == (trained if opened else "bread<|im_end|>")
