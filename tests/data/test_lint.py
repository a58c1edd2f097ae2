"""Each rule of the lint finds planted rows in a clean set, and nothing in the set itself."""

import dataclasses
import json

import numpy as np
import pytest
from kit import make_tokenizer, write_jsonl

from sft_jax.config import DataConfig, SourceConfig
from sft_jax.config.data import LEAVE_OUT
from sft_jax.data.lint.leave_out import leave_out
from sft_jax.data.lint.reading import Reading
from sft_jax.data.lint.rules import RULES, find
from sft_jax.data.lint.summary import summarize_lint
from sft_jax.data.tokens.prepare import prepare_data
from sft_jax.errors import UserError

KEY = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1"
CYRILLIC = "Это ответ на вопрос, который написан другими буквами."
FACTS = {"repeated_answers", "conflicting_answers"}


def word(rng):
    return "".join(rng.choice(list("bdfgklmnprst")) + rng.choice(list("aeiou")) for _ in range(rng.integers(2, 5)))


def prose(rng, low=8, high=20):
    return " ".join(word(rng) for _ in range(rng.integers(low, high))).capitalize()


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def clean(num=120, seed=0):
    rng = np.random.default_rng(seed)
    return [chat(f"{prose(rng)}?", f"{prose(rng)}.") for _ in range(num)]


def text_of(row):
    return tuple(message["content"] for message in row["messages"])


def prepared(folder, rows, name="a.jsonl", **changes):
    config = DataConfig(train=[SourceConfig(path="a.jsonl")], cache=False, **changes)
    source = SourceConfig(path=str(write_jsonl(folder / name, rows)))
    return prepare_data(config, [source], make_tokenizer(), [], 10**6)


def rows_of(finding, read):
    data = read.held_out if finding.is_held_out else read.data
    return data.examples.row[finding.examples].tolist()


def found_in(folder, rows, held_out=(), **changes):
    read = Reading(
        prepared(folder, rows, **changes), prepared(folder, held_out, "eval.jsonl", **changes) if held_out else None
    )
    return {finding.name: rows_of(finding, read) for finding in find(read)}, read


def edited(row, place="answer"):
    """The same row with one word exchanged."""
    question, answer = text_of(row)
    words = (answer if place == "answer" else question).split()
    words[1] = "lanterns"
    return chat(question, " ".join(words)) if place == "answer" else chat(" ".join(words), answer)


def test_a_clean_set_has_no_findings(tmp_path):
    found, read = found_in(tmp_path, clean(), clean(40, seed=1))
    assert found == {}
    lint = summarize_lint(read)
    assert lint["nothing"] == list(RULES)
    assert lint["not_checked"] == {}


def long(rng):
    return chat(f"{prose(rng, 60, 61)}?", f"{prose(rng, 60, 61)}.")


def spoiled(name):
    """Rows that are planted, and which of them the rule finds."""
    rng = np.random.default_rng(9)
    question, row = f"{prose(rng)}?", long(rng)
    return {
        "exact_duplicates": ([row, row], [1]),
        "near_duplicates": ([row, edited(row), edited(row, "question")], [1, 2]),
        "empty_answers": ([chat(question, " \n")], [0]),
        "unfinished_answers": ([chat(question, f"{prose(rng)}. {prose(rng, 12, 13)}")], [0]),
        "copied_questions": ([chat(question, question)], [0]),
        "script_outliers": ([chat(question, CYRILLIC)], [0]),
        "length_outliers": ([chat(question, " ".join(f"{prose(rng, 99, 100)}." for _ in range(3)))], [0]),
        "secrets": ([chat(question, f"The key is {KEY}, keep it.")], [0]),
        "repeated_answers": ([chat(f"{prose(rng)}?", "I cannot help with that, sorry.") for _ in range(15)], range(15)),
        "conflicting_answers": ([chat(question, f"{prose(rng)}."), chat(question, f"{prose(rng)}.")], [0, 1]),
    }[name]


@pytest.mark.parametrize("name", sorted(set(RULES) - {"leaks", "cut_off_answers"}))
def test_planted_rows_are_found(tmp_path, name):
    """And no rule finds a row that is not planted."""
    rows, expected = spoiled(name)
    found, _ = found_in(tmp_path, [*clean(), *rows])
    assert found.pop(name) == [120 + i for i in expected]
    assert all(row >= 120 for rows in found.values() for row in rows), found
    assert set(found) <= {"length_outliers", "conflicting_answers"}, found


def test_answers_that_are_cut_have_no_stop_token(tmp_path):
    rows, rng = clean(), np.random.default_rng(4)
    rows[7] = chat("What?", f"{prose(rng, 300, 301)}.")
    found, _ = found_in(tmp_path, rows, overlong="truncate", max_length=1024)
    assert found["cut_off_answers"] == [7]
    assert "unfinished_answers" not in found


def test_documents_have_no_questions(tmp_path):
    rows = [{"text": f"{row['messages'][1]['content']} {row['messages'][0]['content']}"} for row in clean()]
    assert found_in(tmp_path, rows, rows[:1])[0] == {"leaks": [0]}


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda row: row, "the same conversation"),
        (lambda row: chat(text_of(row)[0], "Another answer, of a few words."), "the same question"),
        (edited, "the same question"),
        (lambda row: edited(row, "question"), "nearly the same conversation, similarity 0.9"),
        (lambda row: chat(text_of(edited(row, "question"))[0], "No, never."), "nearly the same question"),
    ],
)  # fmt: skip
def test_leaks_are_found_and_the_training_rows_go(tmp_path, change, how):
    rng = np.random.default_rng(5)
    row = long(rng)
    rows, held_out = [*clean(), row, row], [*clean(40, seed=1), change(row)]
    found, read = found_in(tmp_path, rows, held_out)
    assert found.pop("leaks") == [40]
    assert found == {"exact_duplicates": [121], "length_outliers": [120, 121]} or set(found) == {"exact_duplicates"}
    (leak,) = find(read, ["leaks"])
    assert how in leak.note(40)
    assert leak.note(40).endswith("a.jsonl row 120")
    kept = leave_out(read.data, read.held_out, ["leaks"])
    assert kept.examples.row.tolist() == list(range(120))
    assert kept.report.left_out == {"leaks": 2}


@pytest.mark.parametrize("num", [10, 60])
def test_a_question_that_everyone_asks_is_no_leak(tmp_path, num):
    rng = np.random.default_rng(0)
    rows = [chat("Write a poem.", f"{prose(rng)}.") for _ in range(num + 10)]
    found, _ = found_in(tmp_path, rows[:num], rows[num:])
    assert set(found) == {"conflicting_answers"}


def test_a_long_system_prompt_makes_no_duplicates(tmp_path):
    """Also not in small data, and if the answers are labels."""
    rng = np.random.default_rng(0)
    prompt = {"role": "system", "content": prose(rng, 120, 121)}
    rows = [chat(f"{prose(rng, 9, 10)}?", rng.choice(["yes", "no"])) for _ in range(16)]
    rows = [{"messages": [prompt, *row["messages"]]} for row in rows]
    assert found_in(tmp_path, rows)[0] == {}


def test_turns_of_one_conversation_are_no_duplicates(tmp_path):
    """Each is an example of its own if the template rewrites earlier turns; here, two rows are made one."""
    rng = np.random.default_rng(5)
    row = long(rng)
    data = prepared(tmp_path, [*clean(), row, edited(row)])
    assert [finding.name for finding in find(Reading(data), ["near_duplicates"])] == ["near_duplicates"]
    rows = data.examples.row.copy()
    rows[121] = 120
    data = dataclasses.replace(data, examples=dataclasses.replace(data.examples, row=rows))
    assert find(Reading(data), ["near_duplicates"]) == []


def test_a_passage_with_several_questions_is_no_duplicate(tmp_path):
    """Their answers differ."""
    rng = np.random.default_rng(6)
    passage = prose(rng, 120, 121)
    rows = [chat(f"{passage}. {word(rng)}?", f"{word(rng)}.") for _ in range(4)]
    found, _ = found_in(tmp_path, [*clean(), *rows])
    assert "near_duplicates" not in found


def test_labels_are_told_once(tmp_path):
    rng = np.random.default_rng(7)
    rows = [chat(f"{prose(rng)}?", rng.choice(["positive", "negative", "neutral"])) for _ in range(200)]
    found, read = found_in(tmp_path, rows)
    assert set(found) == {"repeated_answers"}
    (finding,) = find(read)
    assert finding.what.startswith("3 answers, each to ")
    assert finding.certainty == "fact"


def test_no_rule_about_most_answers_without_many(tmp_path):
    """Some answers end without a full stop, and some are in another script."""
    rows = clean(100)
    for row in rows[:20]:
        row["messages"][1]["content"] = row["messages"][1]["content"].removesuffix(".")
    for row in rows[20:40]:
        row["messages"][1]["content"] = f"{CYRILLIC} {row['messages'][1]['content']}"
    assert found_in(tmp_path, rows)[0] == {}


def test_of_duplicates_the_first_stays_that_no_other_rule_finds(tmp_path):
    """A cut-off copy does not push out the whole one behind it."""
    row = long(np.random.default_rng(8))
    question, answer = text_of(row)
    cut = chat(question, answer.removesuffix("."))
    data = prepared(tmp_path, [*clean(200), cut, row, row])
    both = leave_out(data, None, ["near_duplicates"])
    assert both.report.left_out == {"exact_duplicates": 1, "near_duplicates": 1}
    assert both.examples.row.tolist() == list(range(201))
    better = leave_out(data, None, ["near_duplicates", "unfinished_answers"])
    assert better.examples.row.tolist() == [*range(200), 201]
    assert better.report.left_out == {"unfinished_answers": 1, "exact_duplicates": 1}
    assert [better.report.total(key) for key in ("examples", "kept")] == [203, 201]
    assert better.report.total("tokens") == better.examples.lengths.sum()
    assert better.report.total("targets") == sum(np.count_nonzero(better.examples[i][1][1:]) for i in range(201))
    assert leave_out(data, None, []) is data


def test_refusals(tmp_path):
    data = prepared(tmp_path, clean(60))
    with pytest.raises(UserError, match=r"^data.leave_out: leaks are looked for in held-out data; set data.eval"):
        leave_out(data, None, ["leaks"])
    with pytest.raises(UserError, match=r"^data.leave_out: leaks leaves out all 60 examples"):
        leave_out(data, data, ["leaks"])


def test_what_can_be_left_out_are_the_rules_about_single_rows():
    assert set(LEAVE_OUT) == set(RULES) - FACTS


def test_secrets_are_never_shown(tmp_path):
    """Not in any form of the output, also where a rule shows the text of the row for another reason."""
    rows = clean(200)
    rows[5] = chat(f"Is {KEY} a key?", f"Is {KEY} a key?")
    _, read = found_in(tmp_path, rows)
    lint = summarize_lint(read)
    names = {one["name"]: one for one in lint["findings"]}
    assert {"secrets", "copied_questions"} <= set(names)
    assert names["secrets"]["shown"][0]["note"] == "Hugging Face token hf_a…"
    assert KEY[:8] not in json.dumps(lint)
