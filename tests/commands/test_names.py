"""Keys as other tools and earlier versions write them are answered with ours."""

import dataclasses

import pytest

from sft_jax.config import Config
from sft_jax.config_file import from_dict
from sft_jax.config_names import NAMES, suggest_key
from sft_jax.errors import UserError

SMALLEST = {
    "model": {"path": "builtin:tiny"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "training": {"output_dir": "run"},
}


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("training.gradient_accumulation_steps=4", "use training.num_microbatches, it splits training.batch_size"),
        ("model.weights=bfloat16", "use model.param_dtype"),
        ("lora.token_table=true", "use lora.train_embeddings"),
        ("training.per_device_train_batch_size=4", "use training.batch_size, sequences per step over all devices"),
        ("learning_rate=1e-4", "use optimizer.learning_rate"),
        ("lora.r=8", "use lora.rank"),
        ("lora.lora_alpha=16", "use lora.alpha"),
        ("lora.use_dora=true", "use lora.method=dora"),
        ("model.load_in_4bit=true", "use model.quantization=nf4"),
        ("training.learning_rate=1e-4", "use optimizer.learning_rate"),
        ("data.sequence_len=512", "use data.max_length"),
        ("data.cutoff_len=512", "use data.max_length"),
        ("training.micro_batch_size=2", "use training.batch_size"),
        ("training.save_steps=10", "use training.save_every"),
    ],
)
def test_keys_of_other_tools(override, answer):
    with pytest.raises(UserError) as error:
        from_dict(SMALLEST, [override])
    key = override.partition("=")[0]
    assert f"unknown key {key!r}: {answer}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_for_a_list_of_sources_and_a_contradiction():
    assert from_dict(SMALLEST, ["data.train=b.jsonl"]).data.train[0].path == "b.jsonl"
    assert from_dict(SMALLEST, ["data.eval=c.jsonl"]).data.eval[0].path == "c.jsonl"
    with pytest.raises(UserError, match=r"override 'lora\.rank=8': lora=null turns adapters off"):
        from_dict(SMALLEST, ["lora=null", "lora.rank=8"])


def test_a_file_with_such_a_key():
    with pytest.raises(UserError, match=r"unknown key 'training\.epochs': use training\.num_train_epochs"):
        from_dict(SMALLEST | {"training": {"output_dir": "run", "epochs": 2}})


def test_every_answer_is_a_key_of_ours():
    """Or several, with a value or a place in a list behind."""
    for name, (ours, _) in NAMES.items():
        for one in ours.split(", "):
            section, _, key = one.partition("=")[0].partition(".")
            fields = {field.name: field for field in dataclasses.fields(Config)}
            assert section in fields, (name, ours)
            if key:
                kind = getattr(Config(**_smallest()), section)
                assert hasattr(kind, key.split(".")[0]), (name, ours)
    assert suggest_key("lora.rank") is None


def test_a_key_whose_work_is_that_of_a_command():
    with pytest.raises(UserError, match=r"'training\.push_to_hub': .*run sft-jax export RUN OUT --push USER/REPO"):
        from_dict(SMALLEST | {"training": {"output_dir": "run", "push_to_hub": True}})
    with pytest.raises(UserError, match=r"'training\.hub_token': .*set HF_TOKEN; no token belongs into a config"):
        from_dict(SMALLEST | {"training": {"output_dir": "run", "hub_token": "x"}})


def _smallest():
    config = from_dict(SMALLEST)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
