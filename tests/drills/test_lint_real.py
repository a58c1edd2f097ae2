"""The lint on real data: no false alarms, and all planted rows.

``pytest -n0 -m drill tests/drills/test_lint_real.py``
"""

import json

import numpy as np
import pytest
from kit import ROOT, sft_jax, write_jsonl
from transformers import AutoTokenizer

from sft_jax.config import DataConfig, SourceConfig
from sft_jax.data.lint.reading import Reading
from sft_jax.data.lint.rules import find
from sft_jax.data.tokens.prepare import prepare_data

pytestmark = pytest.mark.drill("sft_jax/data")
NUM = 40


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def reading(folder, tokenizer, train, held_out):
    config = DataConfig(train=[SourceConfig(path="unused")], max_length=8192, cache=False)
    paths = write_jsonl(folder / "train.jsonl", train), write_jsonl(folder / "test.jsonl", held_out)
    return Reading(*(prepare_data(config, [SourceConfig(path=str(path))], tokenizer, [], 10**6) for path in paths))


def test_gsm8k(data_dir, tmp_path):
    """It has no duplicates, no leaks and no broken answers; each planted row is found, and no other."""
    train, test = (rows_of(data_dir / "gsm8k" / f"{name}.jsonl") for name in ("train", "test"))
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2")
    assert find(reading(tmp_path, tokenizer, train, test)) == []
    rng, first = np.random.default_rng(0), len(train)
    copied = [train[i] for i in rng.choice(first, NUM, replace=False)]
    changed = [row | {"question": f"Please, solve: {row['question']}"} for row in copied if len(row["question"]) > 150]
    leaked = [test[i] for i in rng.choice(len(test), NUM, replace=False)]
    planted = [*copied, *changed, *leaked, {"question": "What is left of it?", "answer": " "}]
    read = reading(tmp_path, tokenizer, [*train, *planted], test)
    found = {one.name: one.examples for one in find(read)}
    assert found.pop("exact_duplicates").tolist() == [*range(first, first + NUM)]
    assert found.pop("near_duplicates").tolist() == [*range(first + NUM, first + NUM + len(changed))]
    assert found.pop("leaks").tolist() == sorted(test.index(row) for row in leaked)
    for name in ("empty_answers", "length_outliers"):
        assert found.pop(name).tolist() == [first + len(planted) - 1]
    assert found == {}


def test_the_quickstart():
    """Its answers are names, some of them of many questions; one question is asked twice in nearly the same words."""
    done = sft_jax("inspect", ROOT / "configs" / "quickstart.yaml", "--rows", "0", "--lint", "--json")
    assert done.returncode == 0, done.stderr
    lint = json.loads(done.stdout.splitlines()[1])["lint"]
    assert {one["name"]: (one["count"], one["certainty"]) for one in lint["findings"]} == {
        "near_duplicates": (1, "defect"),
        "repeated_answers": (306, "fact"),
    }
