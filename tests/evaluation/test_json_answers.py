"""JSON answers, compared by field; several accepted answers."""

import json
import sys
from decimal import Decimal

import pytest
from kit import conversations, one_device, run_config, write_jsonl

from sft_jax.config import EvaluationConfig, SourceConfig
from sft_jax.errors import UserError
from sft_jax.evaluation.answers import grade, same_answer
from sft_jax.evaluation.compare import Comparison
from sft_jax.evaluation.json_answers import compare_fields, parse_json
from sft_jax.evaluation.metrics import answer_metrics, answered
from sft_jax.evaluation.questions import Question
from sft_jax.report import table
from sft_jax.run.evaluate import evaluate
from sft_jax.run.train import train

GOLD = '{"name": "Danube", "length": 2850, "mouth": {"sea": "Black Sea", "delta": true}, "from": ["DE", "AT"]}'
RIGHT = json.loads(GOLD)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "written",
    [
        GOLD,
        json.dumps(RIGHT, indent=2),
        GOLD.replace("2850", "2850.0"),
        GOLD.replace("2850", "2.85e3"),
        GOLD.replace('"Danube"', '" Danube\\n"'),
        f"```json\n{GOLD}\n```",
        f"Here it is:\n\n```\n{GOLD}\n```\nAnything else?",
        f'```json\n{{"name": "draft"}}\n```\nNo:\n```json\n{GOLD}\n```',
        f'<think>maybe {{"name": "Rhine"}}</think>\n{GOLD}',
        f"The river with its mouth in [1] is: {GOLD}",
    ],
)
def test_same_json(written):
    assert same_answer(written, GOLD, "json")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "written",
    [
        GOLD.replace("2850", '"2850"'),
        GOLD.replace("2850", "2851"),
        GOLD.replace("true", "1"),
        GOLD.replace("true", "null"),
        GOLD.replace('"DE", "AT"', '"AT", "DE"'),
        GOLD.replace("Danube", "danube"),
        GOLD.replace("}", ', "x": null}'),
        GOLD.replace('"name": "Danube", ', ""),
        GOLD.replace('"name": "Danube", ', '"name": "Danube", "name": "Danube", '),
        GOLD.replace("2850", "NaN"),
        GOLD[:-1],
        f"{GOLD} and {GOLD}, or not",
        "",
        "[" * 100_000,
    ],
)
def test_other_json(written):
    assert not same_answer(written, GOLD, "json")


@pytest.mark.smoke
def test_numbers_beyond_floats():
    assert same_answer("[1e999999999]", "[10e999999998]", "json")
    assert not same_answer("[12345678901234567890123456789012345]", "[12345678901234567890123456789012346]", "json")
    assert parse_json("9" * (sys.get_int_max_str_digits() + 1)) == Decimal("9" * (sys.get_int_max_str_digits() + 1))
    assert parse_json('{"a": {"b": 1}') is None  # the part that is closed is no answer


@pytest.mark.smoke
def test_fields():
    expected = parse_json('{"a": 1, "b": {"d": 2}, "e": [], "f": {}}')
    fields = compare_fields(parse_json('{"a": 1, "c": 3, "b": {"d": 3, "x": 0}, "e": [], "f": {}}'), expected)
    assert fields.right == {"a": True, "b.d": False, "e": True, "f": True}
    assert fields.extra == ["c", "b.x"]
    assert not compare_fields(None, expected).is_json
    assert compare_fields(parse_json("3"), expected).right == dict.fromkeys(["a", "b.d", "e", "f"], False)
    assert compare_fields(parse_json("[1]"), parse_json("[1]")).is_exact


@pytest.mark.smoke
def test_any_accepted_answer_is_right():
    accepted = ('{"a": 1, "b": 2, "c": 3}', '{"a": 5}')
    assert grade('{"a": 5}', accepted, "json").right
    assert grade('{"a": 5}', accepted, "json").fields.right == {"a": True}
    near = grade('{"a": 1, "b": 2, "c": 4}', accepted, "json")
    assert not near.right
    assert near.fields.right == {"a": True, "b": True, "c": False}
    assert grade("IV.", ("4", "four", "iv"), "text").right
    assert not grade("five", ("4", "four"), "text").right


@pytest.mark.smoke
def test_rates_by_field_and_their_table():
    questions = [Question([1], "p", f"q{i}", gold) for i, gold in enumerate([GOLD, '{"name": "Rhine", "lakes": 1}'])]
    written = [GOLD.replace("Black Sea", "Sea"), '{"name": "Rhine", "lakes": 2, "new": 0}', "no JSON"]
    first, second, third = (
        answered(text, question, "json", True, 3)
        for text, question in zip(written, [*questions, questions[1]], strict=True)
    )
    metrics = answer_metrics([first, second])
    assert metrics["exact_match"] == 0
    assert metrics["json_rate"] == 1
    assert metrics["extra_field_rate"] == 0.5
    assert metrics["fields"] == {
        "name": 1.0, "length": 1.0, "mouth.sea": 0.0, "mouth.delta": 1.0, "from": 1.0, "lakes": 0.0
    }  # fmt: skip
    base = answer_metrics([third, third])
    assert base["json_rate"] == 0
    shown = table.as_text(
        Comparison({"base": base, "tuned": metrics}, questions, {"base": [third, third], "tuned": [first, second]})
    )
    lines = [line.split() for line in shown.splitlines()]
    assert ["right,", "by", "field"] in lines
    assert ["name", "0.0%", "100.0%"] in lines
    assert ["mouth.sea", "–", "0.0%"] in lines
    assert ["is", "JSON", "0.0%", "100.0%"] in lines


def test_several_accepted_answers_in_an_evaluation(tiny, chats, tmp_path):
    """An accepted answer that the model writes makes it right, and leaves the held-out loss as it is."""
    rows = [row for row in conversations(4, seed=5) if len(row["messages"]) == 2]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    config = run_config(
        tiny,
        chats,
        tmp_path / "run",
        data__eval=[SourceConfig(str(held_out))],
        training__max_steps=2,
        evaluation=EvaluationConfig(at_end=True, max_new_tokens=6, answer="exact"),
    )
    train(config, one_device())
    answers = tmp_path / "run" / "report" / "answers.jsonl"
    written = [json.loads(line)["tuned"]["text"] for line in answers.read_text().splitlines()]
    before = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())["tuned"]
    assert before["exact_match"] == 0
    write_jsonl(held_out, [{**row, "answers": ["nothing", text]} for row, text in zip(rows, written, strict=True)])
    after = evaluate(config, devices=one_device()).summary["tuned"]
    assert after["exact_match"] == 1
    assert after["loss"] == pytest.approx(before["loss"])
    first = json.loads(answers.read_text().splitlines()[0])
    assert first["accepted"] == [first["answer"], "nothing", written[0]]
    as_json = run_config(
        tiny, chats, tmp_path / "run", data__eval=config.data.eval, training__max_steps=2,
        evaluation=EvaluationConfig(answer="json"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"held_out\.jsonl row 0 is not JSON"):
        evaluate(as_json, devices=one_device())
