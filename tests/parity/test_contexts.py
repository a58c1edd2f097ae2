"""What is trained stands in the context that inference gives: ``apply_chat_template`` of what is before it, to the
character, or the row is refused; and a model that has learned four rows answers them."""

import numpy as np
import pytest
from kit import CHATML, CHATML_UNMARKED, conversations, make_model, one_device, run_config, write_jsonl

from sft_jax.assembly import open_model
from sft_jax.data.chat.encoder import Encoder, prompt_ids
from sft_jax.data.chat.template import ChatTemplates
from sft_jax.data.chat.turns import TurnFinder
from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError
from sft_jax.run.train import train

_HEADER = "{{ '<|im_start|>assistant\n' }}"
_LOOP = (
    "{% for m in messages %}{% if m.role == 'assistant' %}" + _HEADER + "ANSWER{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<tool>' + m.content + '</tool>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + _HEADER + "PROMPT{% endif %}"
)
_CALLS = "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
_LAST = "{{ m.content.split('</think>')[-1] }}"


def _template(answer: str = "{{ m.content }}" + _CALLS, prompt: str = "") -> str:
    return _LOOP.replace("ANSWER", answer).replace("PROMPT", prompt)


# How published templates write answers and what they ask for one with, without their words.
STRUCTURES = {
    "plain": _template(),  # ChatML, Llama 3, Phi, Granite, …
    "thought opened, never written": _template(_LAST + _CALLS, "{{ '<think>\n' }}"),  # DeepSeek R1
    "thought opened, empty where there is none": _template(  # Qwen3.5, Nemotron 3, MiniMax M2
        "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' + m.content }}" + _CALLS, "{{ '<think>\n' }}"
    ),
    "thought opened without a break": _template(  # OLMo 3, GLM 4.7
        "{{ '<think>' + (m.reasoning_content or '') + '</think>' + m.content }}" + _CALLS, "{{ '<think>' }}"
    ),
    "thought closed by the prompt": _template(  # DeepSeek V3.1, Gemma 4, EXAONE 4
        "{{ m.content }}" + _CALLS, "{{ '<|channel>thought\n<channel|>' }}"
    ),
    "thought closed by an argument": _template(  # Qwen3, SmolLM3
        "{% if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
        + _CALLS,
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    ),
    "thoughts of earlier answers taken out": _template(  # Qwen3, QwQ, gpt-oss
        "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
        "{{ m.content }}" + _CALLS
    ),
    "system prompt in the last question": (  # Mistral v3
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' }}"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + '<|endoftext|>' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    ),
    "system prompt in the first question": (  # Gemma 2, Llama 2
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' }}"
        "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}{{ '<|im_start|>model\n' + m.content | trim }}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
    ),
    "answers after the first marked anew": _template("{{ m.content }}" + _CALLS + "{% if not loop.last %} {% endif %}"),
    "marked": CHATML,
    "no generation prompt": CHATML_UNMARKED.split("{% if add_generation_prompt")[0],  # Mistral v1
}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def thought(text, of):
    return answer(text, reasoning_content=of)


_TIDE = {"type": "function", "function": {"name": "tide", "arguments": {"at": "Brest"}}}
ROWS = {
    "plain": [user("What is a fjord?"), answer("A narrow arm of the sea.")],
    "short": [user("2+2?"), answer("4"), user("3+3?"), answer("6")],
    "system": [{"role": "system", "content": "Be kind."}, user("Who?"), answer("A model."), user("Oh"), answer("Yes.")],
    "blanks": [user(" Name a bird. \n"), answer("\n The robin. \n\n"), user("x"), answer(" y")],
    "thoughts": [user("2+2?"), thought("4", "Two and two."), user("3+3?"), thought("6", "Three and three.")],
    "inline": [user("2+2?"), answer("<think>\nTwo and two.\n</think>\n\n4")],
    "a call": [user("High tide?"), answer("", tool_calls=[_TIDE]), {"role": "tool", "content": "6"}, answer("At 6.")],
    "two calls": [
        user("High tides?"),
        answer("Wait.", tool_calls=[_TIDE, _TIDE]),
        *[{"role": "tool", "content": "6"}] * 2,
        answer("Both."),
    ],
}
# Structures and rows that must be read, and not refused.
MUST = {(name, row) for name in STRUCTURES for row in ("plain", "short")} | {
    ("thought opened, never written", "thoughts"),
    ("thought opened, never written", "inline"),
    ("thought opened, never written", "a call"),
    ("thought opened, empty where there is none", "thoughts"),
    ("thoughts of earlier answers taken out", "thoughts"),
    ("thought closed by the prompt", "a call"),
    ("system prompt in the last question", "system"),
    ("system prompt in the first question", "system"),
}


def check(template, row, kwargs, specials) -> int:
    """How many trained turns stand in inference's context; all of them do, or this fails.

    Raises:
        RowError: the row is refused.
    """
    templates = ChatTemplates({"default": template}, specials, "2026-01-01")
    conversation = parse("messages", row | ({"chat_template_kwargs": kwargs} if kwargs else {}))
    trained = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    special = [
        "<|im_end|>",
        "<|endoftext|>",
        "</s>",
        "<|end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|return|>",
        "<|call|>",
    ]
    texts, _ = TurnFinder(templates, special).find(conversation, trained)
    found = 0
    for rendered in texts:
        for i, (begin, end) in rendered.turns.items():
            prompt = templates.choose(False).render(conversation.messages[:i], conversation.tools, True, kwargs)[0]
            assert rendered.text.startswith(prompt)
            assert begin == len(prompt) or rendered.is_marked
            for words in conversation.messages[i].get("content", "").split("</think>"):
                assert words.replace("<think>", "").strip() in rendered.text[begin:end]
            assert conversation.messages[i].get("reasoning_content", "") in rendered.text[begin:end]
            found += 1
    assert found == len(trained)
    return found


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("row", ROWS)
def test_contexts_are_those_of_inference(name, row):
    for kwargs in ({}, {"enable_thinking": False}):
        refused = None
        try:
            assert check(STRUCTURES[name], {"messages": ROWS[row]}, kwargs, {})
        except RowError as error:
            refused = str(error)
        assert refused is None or kwargs or (name, row) not in MUST, refused
        assert refused is None or len(refused) > 40  # a reason


def test_contexts_of_published_templates(data_dir):
    """Those that lie beside the tests, whose special tokens are only text here."""
    folders = (data_dir / "templates", data_dir.parent / "faults" / "templates")
    paths = [path for folder in folders for path in sorted(folder.glob("*.jinja"))]
    assert len(paths) >= 10
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    read = {}
    for path in paths:
        for name, messages in ROWS.items():
            try:
                read[path.stem, name] = check(path.read_text(encoding="utf-8"), {"messages": messages}, {}, specials)
            except RowError:
                read[path.stem, name] = 0
    for path in paths:
        assert read[path.stem, "plain"] == 1, path
        assert read[path.stem, "short"] == 2, path
    assert sum(count > 0 for count in read.values()) > len(read) / 2


DRILL = pytest.mark.drill("sft_jax/data", "sft_jax/inference", "sft_jax/hf/tokenizer.py")


@pytest.mark.parametrize(
    "name",
    [
        "thought opened, never written",
        pytest.param(
            "system prompt in the last question",
            marks=DRILL,
        ),
        pytest.param("thought closed by the prompt", marks=DRILL),
        pytest.param("thought opened without a break", marks=DRILL),
        pytest.param("system prompt in the first question", marks=DRILL),
        pytest.param("marked", marks=DRILL),
    ],
)
def test_a_model_that_has_learned_four_rows_answers_them(name, tmp_path):
    base = make_model(tmp_path / "base")
    template = tmp_path / "template.jinja"
    template.write_text(STRUCTURES[name], encoding="utf-8")
    pairs = [("river", "bread and copper"), ("lantern", "winter"), ("orchard violin", "market"), ("silver", "north")]
    rows = [{"messages": [user(asked), answer(answered)]} for asked, answered in pairs]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = run_config(
        base, data, tmp_path / "run", lora=None, training__max_steps=200, training__batch_size=1,
        data__chat_template=str(template), data__max_length=128, optimizer__learning_rate=5e-3,
    )  # fmt: skip
    train(config, one_device())
    opened = open_model(str(tmp_path / "run"), devices=one_device())
    prompts = [prompt_ids(opened.tokenizer, [user(asked)]) for asked, _ in pairs]
    written = opened.generator(opened.params, opened.frozen, prompts, 24)
    for (_, answered), one in zip(pairs, written, strict=True):
        assert one.stopped
        assert opened.tokenizer.decode(one.ids).split("</think>")[-1].strip() == answered


def test_arguments_of_the_template_reach_every_place_where_it_is_rendered(tmp_path):
    """They are written into the template, so that the run, its exports and whoever opens them have them too."""
    base = make_model(tmp_path / "base")
    template = tmp_path / "template.jinja"
    template.write_text(STRUCTURES["thought closed by an argument"], encoding="utf-8")
    data = write_jsonl(tmp_path / "rows.jsonl", conversations(4))
    config = run_config(
        base, data, tmp_path / "run", training__max_steps=1,
        data__chat_template=str(template), data__template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    train(config, one_device())
    tokenizer = open_model(str(tmp_path / "run"), devices=one_device()).tokenizer
    asked = [user("river")]
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False).endswith(closed)
    assert tokenizer.decode(prompt_ids(tokenizer, asked)).endswith(closed)
    given = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": True}
    assert tokenizer.apply_chat_template(asked, **given).endswith("<|im_start|>assistant\n")
    (result,) = Encoder(tokenizer).encode([parse("messages", {"messages": [*asked, answer("bread")]})])
    (one,) = result
    assert tokenizer.decode(one.ids[np.flatnonzero(one.mask)]) == "bread<|im_end|>"
    assert closed in tokenizer.decode(one.ids)
