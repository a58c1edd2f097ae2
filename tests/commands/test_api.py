"""The Python API does what the commands do."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from kit import conversations, losses, one_device, run_config, sft_jax, write_jsonl
from transformers import AutoTokenizer

import sft_jax as api
from sft_jax.config_file import to_dict


@pytest.fixture(scope="module", autouse=True)
def one():
    """Use one device, as a separate process would."""
    devices = one_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@pytest.fixture(scope="module")
def run(tiny, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("api") / "run"
    return api.train(run_config(tiny, chats, out, training__max_steps=3))


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sft_jax, sys; print(dir(sft_jax)); print(sorted({'jax', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    for name in api.__all__:
        assert name in names
        assert getattr(api, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = api.nothing


def test_there_is_no_notice_that_torch_is_not_installed():
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    for names, is_noticed in (("transformers", True), ("sft_jax; sft_jax.load", False)):
        code = f"import sys; sys.modules['torch'] = None; import {names}"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert ("PyTorch was not found" in done.stderr) == is_noticed, done.stderr


def test_a_config_from_a_file_or_from_dicts(tiny, chats, tmp_path):
    config = run_config(tiny, chats, tmp_path / "run")
    given = to_dict(config)
    assert api.load_config(given) == config
    changed = api.load_config(given, ["optimizer.learning_rate=1e-4"])
    assert (changed.optimizer.learning_rate, config.optimizer.learning_rate) == (1e-4, 5e-3)
    with pytest.raises(api.UserError, match=r"config: unknown key 'lora\.rnk'; did you mean 'rank'\?"):
        api.load_config(given | {"lora": {"rnk": 3}})
    with pytest.raises(api.UserError, match=r"model\.path is required"):
        api.load_config({"training": {"output_dir": "run"}})


def test_a_run_and_its_model(run, tiny, tmp_path):
    """Answers, log-likelihoods and files are the same as those of the commands."""
    assert [row["loss"] for row in run.metrics] == losses(run.folder)
    folder = run.export(tmp_path / "merged", format="merged")
    merged = api.load(folder)
    ids = np.random.default_rng(0).integers(0, 380, (2, 20))
    np.testing.assert_allclose(merged.logits(ids), run.model.logits(ids), atol=1e-4)
    assert run.model.logits(ids).dtype == np.float32
    (answer,) = run.model.generate(["river bread"], max_new_tokens=8)
    command = ("generate", run.folder, "--prompt", "river bread", "--max-new-tokens", 8)
    assert sft_jax(*command).stdout.strip() == answer
    assert run.model.chat([{"role": "user", "content": "river bread"}], max_new_tokens=8) == answer
    rows = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "river", "responses": ["bread", "copper winter"]}])
    printed = sft_jax("score", run.folder, rows, "--json").stdout.splitlines()
    scores = run.model.score("river", ["bread", "copper winter"])
    assert [float(line.split('"log_likelihood": ')[1].split(",")[0]) for line in printed] == pytest.approx(scores)
    assert run.model.architecture.num_layers == 3
    assert run.model.tokenizer("river")["input_ids"] == AutoTokenizer.from_pretrained(tiny)("river")["input_ids"]
    assert run.model.params.keys() == {"adapter", "frozen"}


def test_what_the_commands_print_comes_back(tiny, tmp_path, run, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", conversations(6))
    config = api.load_config(to_dict(run_config(tiny, rows, run.folder)), [f"data.eval=[{{path: {rows}}}]"])
    assert api.inspect(config, rows=0)["rows"] == 6
    assert api.evaluate(config).keys() == {"base", "tuned"}
    assert "exact match" in capsys.readouterr().out


def test_rows_in_memory_train_as_a_file_does(tiny, tmp_path):
    """The losses are the same, and a second call with the same rows resumes. Errors name the index of the row."""
    rows = conversations(8)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    of_file = api.train(run_config(tiny, path, tmp_path / "file", training__max_steps=2))
    config = to_dict(run_config(tiny, "none", tmp_path / "memory", training__max_steps=2))
    del config["data"]["train"]
    events = []
    in_memory = api.train(config, train_data=rows, eval_data=rows[:3], callbacks=[events.append])
    assert [row["loss"] for row in of_file.metrics] == [row["loss"] for row in in_memory.metrics if "loss" in row]
    kinds = [(event.kind, event.step) for event in events]
    assert kinds == [("evaluation", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("save", 2), ("end", 2)]
    assert all(repr(event.run) == repr(in_memory) for event in events)
    assert events[2].metrics["loss"] == in_memory.metrics[-2]["loss"]
    again = api.train(config, train_data=iter(rows), eval_data=rows[:3])
    assert again.metrics == in_memory.metrics
    for bad, words in (
        ([{"messages": object()}], "train_data row 0: cannot be written as JSON"),
        ([rows[0], "a text"], "train_data row 1: is a str, not a dict"),
        ([], "train_data: has no rows"),
    ):
        with pytest.raises(api.UserError, match=words):
            api.train(config, train_data=bad)


def test_a_callback_stops_a_run_that_resumes(tiny, chats, tmp_path):
    whole = api.train(run_config(tiny, chats, tmp_path / "whole", training__max_steps=5))
    config = run_config(tiny, chats, tmp_path / "run", training__max_steps=5)
    run = api.train(config, callbacks=[lambda event: "stop" if event.step == 2 else None])
    stopped = [row["step"] for row in run.metrics]
    assert stopped[-1] < 5
    api.train(config)
    assert [row["loss"] for row in run.metrics] == [row["loss"] for row in whole.metrics]
    assert "data:image/png;base64," in run._repr_html_()
