"""A user error prints one clear line, exits with code 2, and writes no files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from kit import conversations, one_device, process, run_config, write_jsonl
from safetensors.numpy import load_file, save_file

from sft_jax import config_file as configs
from sft_jax.config import MeshConfig
from sft_jax.errors import UserError
from sft_jax.run.export import export
from sft_jax.run.train import train


def refused(config, *words):
    """Check that training in this process raises an error with these words and writes nothing."""
    with pytest.raises(UserError) as raised:
        train(config, one_device())
    text = str(raised.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert not Path(config.training.output_dir).exists()


def test_exit_code_and_one_line(tiny, chats, tmp_path):
    configs.save(run_config(tiny, chats, tmp_path / "run"), tmp_path / "a.yaml")
    for arguments, words in (
        (["train", tmp_path / "absent.yaml"], "absent.yaml: no such config file"),
        (["train", tmp_path / "a.yaml", "lora.target_modules=[c_attn]"], "'c_attn' matches no linear layer"),
    ):
        done = process(*arguments)
        assert done.returncode == 2
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_model(tiny, chats, tmp_path):
    out = tmp_path / "run"

    def broken(name, edit_config=None, edit_tensors=None):
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        if edit_config:
            config = json.loads((folder / "config.json").read_text()) | edit_config
            (folder / "config.json").write_text(json.dumps(config))
        if edit_tensors:
            tensors = load_file(folder / "model.safetensors")
            edit_tensors(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    refused(run_config(tmp_path / "absent", chats, out), "model.path", "absent")
    refused(
        run_config("some/model", chats, out),
        "'some/model' is no local folder",
        "not in the local cache",
    )
    refused(run_config(tmp_path, chats, out), "has no config.json")
    refused(run_config(broken("bloom", {"model_type": "bloom"}), chats, out), "'bloom' is not supported", "llama")
    refused(run_config(broken("mish", {"hidden_act": "mish"}), chats, out), "hidden_act 'mish'")
    refused(run_config(broken("quantized", {"quantization_config": {"bits": 4}}), chats, out), "quantized")
    scaling = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 5, "long_factor": [2.0] * 6}
    longrope = broken("longrope", {"rope_scaling": scaling | {"original_max_position_embeddings": 64}})
    refused(run_config(longrope, chats, out), "short_factor has 5 values")
    name = "model.layers.1.mlp.up_proj.weight"
    refused(run_config(broken("missing", None, lambda t: t.pop(name)), chats, out), f"tensor {name} is missing")
    wrong = broken("wrong", None, lambda t: t.update({name: np.zeros((3, 3), np.float32)}))
    refused(run_config(wrong, chats, out), f"tensor {name} has shape (3, 3)", "(112, 48)")
    extra = broken("extra", None, lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)}))
    refused(run_config(extra, chats, out), "model.extra.weight has no place")
    integer = broken("integer", None, lambda t: t.update({name: t[name].astype(np.int32)}))
    refused(run_config(integer, chats, out), name, "dtype int32")
    damaged = broken("damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:5000])
    refused(run_config(damaged, chats, out), "damaged safetensors file")
    lost = broken("lost")
    (lost / "tokenizer.json").unlink()
    refused(run_config(lost, chats, out), "lost", "tokenizer")
    untemplated = broken("untemplated")
    (untemplated / "chat_template.jinja").unlink()
    refused(run_config(untemplated, chats, out), "no chat template")


def test_data(tiny, chats, tmp_path):
    out = tmp_path / "run"

    def text(content, name="bad.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    good = "".join(json.dumps(row) + "\n" for row in conversations(3))
    refused(run_config(tiny, tmp_path / "absent.jsonl", out), "absent.jsonl")
    refused(run_config(tiny, text(good + '{"messages": [\n'), out), "bad.jsonl:4: not valid JSON")
    refused(run_config(tiny, text(good.encode() + b'{"messages": "\xff\xfe"}\n'), out), "bad.jsonl:4: not valid UTF-8")
    refused(run_config(tiny, text("", "empty.jsonl"), out), "empty.jsonl: has no rows")
    refused(run_config(tiny, text('{"foo": 1}\n', "foo.jsonl"), out), "no known format in the columns foo")
    refused(run_config(tiny, text("a,b\n", "a.ods"), out), "unknown kind of file '.ods'")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}
    refused(
        run_config(tiny, write_jsonl(tmp_path / "b.jsonl", [*conversations(2), row]), out), "b.jsonl row 2", "'content'"
    )
    row = {"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}
    refused(
        run_config(tiny, write_jsonl(tmp_path / "c.jsonl", [*conversations(2), row]), out), "c.jsonl row 2", "'role'"
    )
    refused(
        run_config(tiny, write_jsonl(tmp_path / "d.jsonl", [{"text": 3}]), out), "d.jsonl row 0", "must be a string"
    )
    refused(run_config(tiny, chats, out, data__max_length=4), "all 40 rows are longer than data.max_length 4")
    refused(run_config(tiny, chats, out, data__chat_template="absent.jinja"), "no such file absent.jinja")
    bad_template = text("{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}", "t.jinja")
    refused(run_config(tiny, chats, out, data__chat_template=str(bad_template)), "row 0", "roles must alternate")
    refused(run_config(tiny, chats, out, data__stop_token="<|nope|>"), "data.stop_token", "<|nope|>")
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "river " * 600}])
    refused(run_config(tiny, long, out, data__max_length=1024), "the model has 512 positions", "data.max_length=512")


def test_batch_mesh_and_folders(tiny, chats, tmp_path):
    out = tmp_path / "run"
    refused(run_config(tiny, chats, out, mesh=MeshConfig(data=3, fsdp=1)), "needs 3 devices, but there is 1")
    with pytest.raises(UserError, match="do not divide over the 8 devices"):
        train(run_config(tiny, chats, out))
    with pytest.raises(UserError, match="8 does not divide the 4 heads"):
        train(run_config(tiny, chats, out, mesh=MeshConfig(fsdp=1, tensor=8)))
    with pytest.raises(
        UserError, match=r"mesh.sequence: 8 does not divide sequences of 100 tokens .*; these do: 1, 2, 4, 5,"
    ):
        train(run_config(tiny, chats, out, data__max_length=100, mesh=MeshConfig(fsdp=1, sequence=8)))
    with pytest.raises(UserError, match=r"sequences of 8 or 16 or 32 or 56 or 100 tokens \(.* without data.packing"):
        train(
            run_config(tiny, chats, out, data__max_length=100, data__packing=False, mesh=MeshConfig(fsdp=1, sequence=8))
        )
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not a run"):
        train(run_config(tiny, chats, tmp_path / "mine"), one_device())
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "config.yaml"
    own.write_text("{}  # mine")
    with pytest.raises(UserError, match="holds files that are not a run"):
        train(run_config(tiny, chats, tmp_path / "experiment"), one_device())
    assert own.read_text() == "{}  # mine"


def test_adapter_to_continue_from(tiny, chats, tmp_path):
    train(run_config(tiny, chats, tmp_path / "first", training__max_steps=2), one_device())
    export(tmp_path / "first", tmp_path / "adapter")
    start = str(tmp_path / "adapter")
    out = tmp_path / "run"
    refused(run_config(tiny, chats, out, lora__init_from=start, lora__rank=8), "the adapter in", "set lora.rank=4")
    refused(run_config(tiny, chats, out, lora__init_from=start, lora__alpha=3.0), "set lora.alpha=8")
    refused(run_config(tiny, chats, out, lora__init_from=start, lora__target_modules=["q_proj"]), "add its module")
    refused(run_config(tiny, chats, out, lora__init_from=str(tmp_path)), "has no adapter_config.json")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"use_qalora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refused(run_config(tiny, chats, out, lora__init_from=start), "use_qalora=True is not supported")
    config = config | {"use_qalora": False, "init_lora_weights": "pissa"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refused(run_config(tiny, chats, out, lora__init_from=start), "init_lora_weights='pissa' has changed the base model")
