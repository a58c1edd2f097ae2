"""Few-shot prompts: turns of a chat for models that know chats, plain text for others."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from kit import CHATML, CHATML_UNMARKED, make_tokenizer, one_device, run_config, sft_jax, write_jsonl

from sft_jax import builtin, config_file
from sft_jax.config import DataConfig, EvaluationConfig, SourceConfig
from sft_jax.data.chat.template import ChatTemplates
from sft_jax.data.tokens.prepare import prepare_data
from sft_jax.errors import UserError
from sft_jax.evaluation.few_shot import chat_prompt, cut_at_blank_line, draw, few_shot_of, text_prompt
from sft_jax.evaluation.questions import Question, questions
from sft_jax.evaluation.task import prepare
from sft_jax.hf.config import read_architecture
from sft_jax.hf.tokenizer import has_template, load_tokenizer
from sft_jax.run.train import train

SHOTS = [{"question": f"Which river is {name}?", "answer": f"{name} river"} for name in ("north", "south", "quiet")]
TOOL = {"type": "function", "function": {"name": "tide", "description": "the tide", "parameters": {}}}
HELD_OUT = [
    {"messages": [
        {"role": "system", "content": "Be quiet."},
        {"role": "user", "content": "bread"}, {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "copper"}, {"role": "assistant", "content": "twelve"},
    ]},
    {"messages": [{"role": "user", "content": "winter"}, {"role": "assistant", "content": "yellow"}]},
]  # fmt: skip


def encoded(tmp_path, tokenizer, rows=HELD_OUT, stops=(2,)):
    """Held-out rows, and their questions."""
    config = DataConfig(train=[SourceConfig("-")], max_length=128, cache=False)
    file = write_jsonl(tmp_path / "held_out.jsonl", rows)
    held_out = prepare_data(config, [SourceConfig(str(file))], tokenizer, stops, 512, is_held_out=True)
    return held_out, questions(held_out.examples, held_out.sources, tokenizer)


@pytest.mark.smoke
def test_plain_text():
    question = Question([1], "", "3+3?", "6")
    assert text_prompt(question, [("2+2?", "4")]) == "Question: 2+2?\nAnswer: 4\n\nQuestion: 3+3?\nAnswer:"
    assert text_prompt(question, []) == "Question: 3+3?\nAnswer:"
    with pytest.raises(UserError, match=r"2 answered questions requested, but data\.train has 1"):
        draw(1, [("2+2?", "4")], 2, 0)
    assert cut_at_blank_line(" 6\n\nQuestion: 4+4?") == ("6", True)
    assert cut_at_blank_line(" 6\nof course") == ("6\nof course", False)


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_chat_prompts_are_those_of_transformers(tmp_path, template):
    """System message, shots, own turns, generation prompt; without shots the ids that training saw."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = template
    _, asked = encoded(tmp_path, tokenizer)
    templates = ChatTemplates.of(tokenizer)
    for question, row in zip(asked, HELD_OUT, strict=True):
        assert chat_prompt(tokenizer, templates, question, []) == question.prompt_ids
        own = row["messages"][:-1]
        system = own[:1] if own[0]["role"] == "system" else []
        turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
        expected = tokenizer.apply_chat_template(
            [*system, *turns, *own[len(system) :]], add_generation_prompt=True, return_dict=True
        )
        assert chat_prompt(tokenizer, templates, question, [("2+2?", "4")]) == expected["input_ids"]


def test_tools_and_template_arguments_of_the_question(tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = (
        "{% if tools %}{{ 'tools ' + tools[0].function.name + tools[0].function.description + '\n' }}{% endif %}"
        "{{ mood | default('') }}" + CHATML
    )
    row = {"messages": HELD_OUT[1]["messages"], "tools": [TOOL], "chat_template_kwargs": {"mood": "quiet"}}
    _, (question,) = encoded(tmp_path, tokenizer, [row])
    text = tokenizer.decode(chat_prompt(tokenizer, ChatTemplates.of(tokenizer), question, [("2+2?", "4")]))
    assert text.startswith("tools tidethe tide\nquiet<|im_start|>user\n2+2?")
    assert text.endswith("4<|im_end|>\n<|im_start|>user\nwinter<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_rejects_the_shots(tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    _, (question,) = encoded(tmp_path, tokenizer, HELD_OUT[1:])
    with pytest.raises(UserError, match=r"evaluation\.shots: .*held_out\.jsonl row 0: .*one turn only.*; set eval"):
        chat_prompt(tokenizer, ChatTemplates.of(tokenizer), question, [("2+2?", "4")])


def test_the_form_is_what_the_base_model_knows(tiny, tmp_path):
    tokenizer, _ = load_tokenizer(tiny)
    held_out, asked = encoded(tmp_path, tokenizer)
    shots = [(row["question"], row["answer"]) for row in SHOTS]
    chat = few_shot_of(asked, shots, 2, 0, held_out, [2], tiny)
    assert (chat.form, chat.note) == ("chat", "2 answered questions as earlier turns of the chat")
    assert all("river<|im_end|>" in tokenizer.decode(prompt) for prompt in chat.prompts)
    assert chat.ends("a\n\nb", False) == ("a\n\nb", False)
    of_documents = few_shot_of(asked, shots, 2, 0, held_out, [0], tiny)
    assert of_documents.form == "text"
    assert "because the base model does not stop at '<|im_end|>', which ends a turn" in of_documents.note
    assert of_documents.ends("a\n\nb", False) == ("a", True)
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    assert not has_template(bare)
    without = few_shot_of(asked, shots, 2, 0, held_out, [2], bare)
    assert (without.form, without.note.partition(", because ")[2]) == (
        "text", "the base model has no chat template of its own"
    )  # fmt: skip
    rows = [*HELD_OUT, {"prompt": "bread", "completion": " twelve"}]
    plain, asked = encoded(tmp_path, tokenizer, [rows[2]])
    assert few_shot_of(asked, shots, 2, 0, plain, [2], tiny).note.endswith("because held-out prompts are plain text")


@pytest.mark.smoke
def test_the_model_of_the_quickstart_was_pretrained_on_documents():
    folder = Path(builtin.__file__).parent / "tiny"
    assert has_template(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    assert load_tokenizer(folder)[0].convert_ids_to_tokens(config["eos_token_id"]) != "<|im_end|>"


def test_rows_that_are_left_out_are_no_shots(tiny, tmp_path):
    rows = [*SHOTS, {"question": "winter", "answer": "yellow river"}]
    tokenizer, _ = load_tokenizer(tiny)
    files = [write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "held_out.jsonl", HELD_OUT[1:])]
    for names in ([], ["leaks"]):
        config = run_config(
            tiny,
            files[0],
            tmp_path / "run",
            data__eval=[SourceConfig(str(files[1]))],
            data__leave_out=names,
            evaluation=EvaluationConfig(at_end=True, shots=4 - len(names), hardest=4),
        )
        task = prepare(config, read_architecture(tiny), tokenizer, [2])
        (prompt,) = task.few_shot.prompts
        assert ("yellow" in tokenizer.decode(prompt)) == (not names)
        assert all(row["answer"] in tokenizer.decode(prompt) for row in SHOTS)
        assert len(task.hardest) == 4 - len(names)
    too_many = dataclasses.replace(config, evaluation=EvaluationConfig(at_end=True, shots=4))
    with pytest.raises(UserError, match=r"4 answered questions requested, but data\.train has 3"):
        prepare(too_many, read_architecture(tiny), tokenizer, [2])


def test_the_form_in_reports(tiny, chats, tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", HELD_OUT)
    config = run_config(
        tiny,
        chats,
        tmp_path / "run",
        data__eval=[SourceConfig(str(held_out))],
        training__max_steps=1,
        evaluation=EvaluationConfig(at_end=True, max_new_tokens=4, shots=2),
    )
    train(config, one_device())
    config_file.save(config, tmp_path / "config.yaml")
    report = tmp_path / "run" / "report"
    assert json.loads((report / "summary.json").read_text())["few_shot"]["form"] == "chat"
    assert "shots as earlier turns" in (report / "report.html").read_text()
    done = sft_jax("evaluate", tmp_path / "config.yaml")
    assert " few-shot  2 answered questions as earlier turns of the chat" in done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "few-shot prompt" in line)
    assert line.split()[-3:] == ["–", "chat", "–"]
