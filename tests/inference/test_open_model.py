"""Every kind of model opens, and the commands that generate."""

import json

import pytest
from kit import CHATML, make_model, one_device, run_config, sft_jax
from test_generate import PROMPTS, ids_of

from sft_jax.assembly import open_model
from sft_jax.cli import main
from sft_jax.commands.generate import read_prompts
from sft_jax.errors import UserError
from sft_jax.run.export import export
from sft_jax.run.generate import generate
from sft_jax.run.train import train


@pytest.fixture(scope="module")
def tuned(tiny, chats, tmp_path_factory):
    """A LoRA run and a full run, one of them with added tokens, and their exports."""
    folder = tmp_path_factory.mktemp("tuned")
    template = folder / "template.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|done|>"))
    added = {"data__chat_template": str(template), "data__added_tokens": ["<|done|>"]}
    for name, changes in {"lora": {}, "added": added, "full": {"lora": None}}.items():
        train(run_config(tiny, chats, folder / name, training__max_steps=8, **changes), one_device())
        export(folder / name, folder / f"{name}-merged", "merged")
        if name != "full":
            export(folder / name, folder / f"{name}-adapter")
    return folder


@pytest.mark.parametrize("name", ["lora", "added", "full"])
def test_run_adapter_and_merged_write_the_same(tuned, tiny, name):
    kinds = ["", "-merged"] + (["-adapter"] if name != "full" else [])
    models = [open_model(str(tuned / f"{name}{kind}"), devices=one_device()) for kind in kinds]
    base = open_model(str(tiny), devices=one_device())
    written = [[text for _, text in generate(model, ["Which river?", "bread"], 24)] for model in models]
    assert written[0] == written[1] == written[-1]
    assert written[0] != [text for _, text in generate(base, ["Which river?", "bread"], 24)]
    assert {tuple(model.stop_ids) for model in models} == {(384, 2) if name == "added" else (2,)}


def test_an_adapter_finds_its_base_or_says_why_not(tuned, tiny, tmp_path):
    import shutil

    adapter = tmp_path / "adapter"
    shutil.copytree(tuned / "lora-adapter", adapter)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"adapter_config.json: base_model_name_or_path: no folder .*gone"):
        open_model(str(adapter), devices=one_device())
    moved = open_model(str(adapter), base=str(tiny), devices=one_device())
    there = open_model(str(tuned / "lora-adapter"), devices=one_device())
    assert ids_of(moved, PROMPTS) == ids_of(there, PROMPTS)
    other = make_model(tmp_path / "other", hidden_size=60)
    with pytest.raises(UserError, match=r"made for another model: \(.*48.*\), this one has \(.*60.*\)"):
        open_model(str(adapter), base=str(other), devices=one_device())
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=2)
    with pytest.raises(UserError, match=r"layers\.2\..* has no place"):
        open_model(str(adapter), base=str(shallow), devices=one_device())
    path.write_text(json.dumps(config | {"use_qalora": True}))
    with pytest.raises(UserError, match="use_qalora=True is not supported"):
        open_model(str(adapter), devices=one_device())


def test_what_cannot_be_opened(tuned, tiny, tmp_path):
    for arguments, words in (
        ({"name": str(tmp_path / "nowhere")}, "no folder"),
        ({"name": "builtin:huge"}, "'builtin:huge' is not built in; there are builtin:tiny"),
        ({"name": str(tmp_path)}, "neither a run, nor a Hugging Face model, nor a PEFT adapter"),
        ({"name": str(tuned / "lora"), "step": 3}, "no checkpoint of step 3; there are 8"),
        ({"name": str(tuned / "lora"), "base": "x"}, "--base: no folder 'x'"),
        ({"name": str(tiny), "step": 3}, "only run directories have steps"),
        ({"name": str(tiny), "base": "x"}, "only runs and adapters have a base"),
    ):
        with pytest.raises(UserError) as raised:
            open_model(**arguments, devices=one_device())
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_command_line(tuned, tiny, tmp_path):
    run, prompt = str(tuned / "lora"), "Which river?"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "bread and copper"}) + "\n")
    done = sft_jax("generate", run, "--prompt", prompt, "--file", file, "--json", "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == [prompt, "bread and copper"]
    model = open_model(run, devices=one_device())
    for row, (one, text) in zip(rows, generate(model, [row["prompt"] for row in rows], 12), strict=True):
        assert row == {
            "prompt": row["prompt"],
            "text": text,
            "token_ids": one.ids,
            "finish_reason": "stop" if one.stopped else "length",
        }
    streamed = sft_jax("generate", run, "--prompt", prompt, "--max-new-tokens", 12)
    assert streamed.stdout == rows[0]["text"] + "\n"
    raw = sft_jax("generate", run, "--prompt", prompt, "--raw", "--max-new-tokens", 12)
    expected = ids_of(model, [model.tokenizer(prompt)["input_ids"]], 12)[0]
    assert raw.stdout == model.tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_chat_keeps_what_was_said(tiny, monkeypatch, capsys):
    import io

    run = str(tiny)
    model = open_model(run, devices=one_device())
    monkeypatch.setattr("sys.stdin", io.StringIO("Which river?\nAnd bread?\n/reset\nAnd bread?\n"))
    assert main(["generate", run, "--chat", "--max-new-tokens", "10"]) == 0
    first, second, fresh = capsys.readouterr().out.splitlines()
    said = [{"role": "user", "content": "Which river?"}]
    for shown, messages in (
        (first, said),
        (second, [*said, {"role": "assistant", "content": first}, {"role": "user", "content": "And bread?"}]),
        (fresh, [{"role": "user", "content": "And bread?"}]),
    ):
        ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert shown == model.tokenizer.decode(ids_of(model, [ids], 10)[0], skip_special_tokens=True).strip()
    assert second != fresh


def test_bad_command_lines(tuned, tiny, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="has no prompts"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="row 1: has no string 'prompt'"):
        read_prompts(str(tmp_path / "rows.jsonl"))
    for arguments, words in (
        (["generate", tiny], "nothing to answer"),
        (["generate", tiny, "--chat", "--json"], "--chat reads what you type"),
        (["generate", tiny, "--prompt", "a", "--temperature", "-1"], "temperature: -1.0 is negative"),
        (["generate", tiny, "--prompt", "a", "--top-p", "0"], "top-p: 0.0 is not in (0, 1]"),
        (["generate", tmp_path / "gone", "--prompt", "a"], "no folder"),
        (["generate", tiny, "--prompt", "bread " * 600], "the model's context has 512"),
    ):
        assert main([*map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert words in said.splitlines()[-1]
        assert "Traceback" not in said
