"""Absurd numbers and hostile YAML in a config are refused by key, before anything is allocated."""

import numpy as np
import pytest

from sft_jax import config_file
from sft_jax.config import DataConfig, TrainingConfig
from sft_jax.data.batches.packing import plan_of
from sft_jax.data.chat.encoder import Encoded
from sft_jax.data.tokens.examples import join
from sft_jax.errors import UserError

GOOD = "model: {path: builtin:tiny}\ndata: {train: [{path: a.jsonl}]}\ntraining: {output_dir: run, max_steps: 1}\n"


def refused(tmp_path, text, *overrides):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError) as raised:
        config_file.load(tmp_path / "a.yaml", list(overrides))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=1000000000000000000", "training.max_steps: 1,000,000,000,000,000,000 is more than"),
        ("training.max_steps=2000000", "training.max_steps: 2,000,000 is more than 1,000,000; set data.streaming"),
        ("[a=r", "override '[a=r': write key=value"),
        ("a..b=r", "override 'a..b=r': write key=value"),
        ("training.seed=-1", "training.seed: -1 is negative"),
        ("training.batch_size=1000000000000", "training.batch_size: 1,000,000,000,000 is more than 1,048,576"),
        ("data.max_length=1000000000", "data.max_length: 1,000,000,000 is more than 4,194,304"),
        ("data.num_workers=100000", "data.num_workers: 100,000 is more than 1,024"),
        ("data.train=[{path: a, weight: 1e300}]", "data.*.weight: 1e+300 is more than 10,000"),
        ("data.train=[{path: a, weight: .nan}]", "data.*.weight"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: inf is not a finite number"),
        ("optimizer.warmup_ratio=-1", "optimizer.warmup_ratio"),
        ("lora.rank=1000000", "lora.rank: 1,000,000 is more than 65,536"),
        (f"lora.alpha={'9' * 400}", "lora.alpha is too large"),
        (f"lora.rank={'9' * 400}", "lora.rank: 999999… with 400 digits is more than 65,536"),
        (f"lora.rank={'9' * 5000}", "not valid YAML"),
        (f"data.train={'[' * 3000}", "is nested more than 50 levels deep"),
    ],
)
def test_numbers(tmp_path, override, message):
    assert message in refused(tmp_path, GOOD, override)


def test_tokens_of_a_step(tmp_path):
    message = refused(tmp_path, GOOD, "data.max_length=1000000", "training.batch_size=1000000")
    assert message.startswith("training.batch_size: 1,000,000 sequences of data.max_length 1,000,000 are more than")


def test_aliases_are_counted_before_they_expand(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    bomb = "\n".join(lines) + "\n" + GOOD
    assert "has more than 100,000 values, with its aliases expanded" in refused(tmp_path, bomb)
    merged = bomb.replace("[x, x, x, x, x, x, x, x, x]", "{k: v}").replace(": &a", ": &a").replace("[*", "{<<: [*")
    merged = "\n".join(line + "}" if "<<" in line else line for line in merged.splitlines())
    assert "has more than 100,000 values" in refused(tmp_path, merged)
    assert "a value contains itself" in refused(tmp_path, "data: &a {train: *a}")
    (tmp_path / "b.yaml").write_text(GOOD.replace("{output_dir", "&t {output_dir") + "lora: &l {rank: 4}\n")
    assert config_file.load(tmp_path / "b.yaml").lora.rank == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("a: " + "[" * 100_000, "is nested more than 50 levels deep"),
        ("a: " + "x" * (2 << 20), "has more than 1 MB"),
        ("a: \0", "not valid YAML"),
        ("a: \udcff", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['echo']", "not valid YAML"),
        ("a: !own 1", "not valid YAML"),
        ("lora: {target_modules: &a [*a]}", "a value contains itself"),
    ],
)
def test_yaml(tmp_path, more, message):
    assert message in refused(tmp_path, GOOD + more)


def examples(weight):
    joined = join([Encoded(np.arange(5, dtype=np.int32), np.ones(5, np.float32)) for _ in range(4)], "a.jsonl")
    return joined.__class__(**{**joined.__dict__, "weights": (weight,)})


def test_plans_of_absurd_sizes():
    data = DataConfig(max_length=16)
    with pytest.raises(UserError, match=r"their weights are 4e-06 examples per epoch; increase data\.\*\.weight"):
        plan_of(data, TrainingConfig("run", max_steps=1), examples(1e-6))
    with pytest.raises(UserError, match=r"data\.\*\.weight: 4e\+12 examples"):
        plan_of(data, TrainingConfig("run", max_steps=1), examples(1e12))
    with pytest.raises(UserError, match=r"training\.num_train_epochs: 4e\+09 examples"):
        plan_of(data, TrainingConfig("run", num_train_epochs=1e9), examples(1.0))
    assert plan_of(data, TrainingConfig("run", num_train_epochs=2), examples(2.0)).num_steps == 2
