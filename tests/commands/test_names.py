"""Keys of other tools are answered with ours: all of TRL, transformers and PEFT, and those that exist here are real."""

import dataclasses
import importlib.util
import re
import subprocess
import sys

import pytest
from kit import ROOT

from sft_jax import config
from sft_jax.cli import main
from sft_jax.config_file import from_dict
from sft_jax.config_names import TOOLS, earlier, suggest_key
from sft_jax.errors import UserError

SECTIONS = {
    "model": config.ModelConfig,
    "lora": config.LoraConfig,
    "data": config.DataConfig,
    "optimizer": config.OptimizerConfig,
    "training": config.TrainingConfig,
    "evaluation": config.EvaluationConfig,
    "mesh": config.MeshConfig,
}
SMALLEST = {
    "model": {"path": "builtin:tiny"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "training": {"output_dir": "run"},
}
KEYS = {
    (tool, key): value for tool, table in {**TOOLS, "earlier": earlier.KEYS}.items() for key, value in table.items()
}


def names(kind) -> set[str]:
    return {one.name for one in dataclasses.fields(kind)}


@pytest.mark.parametrize(("tool", "key"), KEYS, ids=lambda text: text)
def test_our_keys_exist(tool, key):
    ours, note = KEYS[tool, key]
    assert ours or note
    for one in filter(None, ours.split(", ")):
        section, _, name = re.sub(r"=.*", "", one).partition(".")
        assert section in SECTIONS
        source = re.fullmatch(r"(train|eval)\.\d\.(\w+)", name)
        known = names(config.SourceConfig) if source else names(SECTIONS[section])
        assert not name or (source[2] if source else name) in known


def fields():
    import peft
    import trl

    for kind in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, peft.LoraConfig):
        for one in dataclasses.fields(kind):
            yield f"{kind.__name__}.{one.name}"


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_every_key_of_trl_is_answered():
    here = set().union(*map(names, SECTIONS.values())) | names(config.SourceConfig)
    silent = [key for key in fields() if suggest_key(key) is None and key.rpartition(".")[2] not in here]
    assert not silent


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("lr=1e-4", "unknown key 'lr': use optimizer.learning_rate"),
        ("learning_rate=1e-4", "unknown key 'learning_rate': use optimizer.learning_rate"),
        ("per_device_train_batch_size=4", "use training.batch_size, sequences per step over all devices"),
        ("lora_r=8", "use lora.rank"),
        ("lora_alpha=8", "use lora.alpha"),
        ("lora.lora_alpha=8", "use lora.alpha"),
        ("load_in_4bit=true", "use model.quantization=nf4"),
        ("training.report_to=wandb", "use training.tensorboard, training.wandb_project"),
        ("push_to_hub=true", "unknown key 'push_to_hub': there is no such key"),
        ("model=Qwen/Qwen3-0.6B", "model is a section; use model.path=Qwen/Qwen3-0.6B"),
        ("dataset_text_field=body", "use data.train.0.columns={text: COLUMN}"),
        ("training.ddp_backend=nccl", "use mesh.data, the number of replicas"),
        ("neftune_noise_alpha=5", "noise on embeddings (NEFTune) is not available"),
        ("--model=Qwen/Qwen3-0.6B", "config keys are written key=value: use model.path=…"),
        ("--learning-rate=1e-4", "config keys are written key=value: use optimizer.learning_rate"),
        ("--trust-remote-code", "there is no such key: no code of a model is run"),
    ],
)
def test_mistakes_are_answered_with_the_key(argument, answer, capsys):
    config_file = str(ROOT / "configs" / "quickstart.yaml")
    try:
        code = main(["train", config_file, argument])
    except SystemExit as raised:  # raised by argparse
        code = raised.code
    assert code == 2
    assert answer in capsys.readouterr().err


def test_the_migration_table_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "tools" / "migration.py", "--check"], check=False)
    assert done.returncode == 0, "run python tools/migration.py"


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


def test_a_key_whose_work_is_that_of_a_command():
    with pytest.raises(UserError, match=r"'training\.push_to_hub': .*sft-jax export RUN OUT --push USER/REPO"):
        from_dict(SMALLEST | {"training": {"output_dir": "run", "push_to_hub": True}})
    with pytest.raises(UserError, match=r"'training\.hub_token': .*HF_TOKEN; no token belongs into a config"):
        from_dict(SMALLEST | {"training": {"output_dir": "run", "hub_token": "x"}})
