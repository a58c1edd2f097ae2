"""lm-evaluation-harness: the model ``sft-jax`` gives the results of its model ``hf`` on the same exported folder.

Needs ``pip install '.[lm-eval]'`` beside the test requirements.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from kit import ROOT, one_device, run_config

from sft_jax import builtin
from sft_jax.config import SourceConfig
from sft_jax.run.export import export
from sft_jax.run.train import train

pytestmark = [
    pytest.mark.drill("sft_jax/evaluation", "sft_jax/inference", "sft_jax/hf"),
    pytest.mark.package("lm_eval"),
    pytest.mark.filterwarnings("ignore"),  # of the harness and of the libraries that it loads
]
CHOICE = """
task: countries_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{choices.index(answer)}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
task: countries_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", " of"], max_gen_toks: 16}
metric_list: [{metric: exact_match, ignore_case: true}]
filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]
"""
TEXT = """
task: countries_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def lm_eval():
    import lm_eval

    return lm_eval


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A short run of the built-in model, its export, and a folder of tasks: 25 questions, 4 texts."""
    folder = tmp_path_factory.mktemp("harness")
    config = run_config(
        "builtin:tiny",
        "builtin:countries/train.jsonl",
        folder / "run",
        training__max_steps=40,
        training__batch_size=8,
        optimizer__learning_rate=1e-3,
        data__train=[SourceConfig("builtin:countries/train.jsonl")],
    )
    train(config, one_device())
    export(folder / "run", str(folder / "model"), "merged")
    rows = [
        tuple(one["content"] for one in json.loads(line)["messages"])
        for line in builtin.locate("builtin:countries/heldout.jsonl", "test").read_text().splitlines()
    ]
    answers = sorted({answer for _, answer in rows})
    rng = np.random.default_rng(0)
    docs = []
    for question, answer in rows[::20]:
        others = rng.choice([one for one in answers if one != answer], 3, replace=False).tolist()
        docs.append({"question": question, "answer": answer, "choices": sorted([answer, *others])})
    texts = [
        json.loads(line)["text"]
        for line in builtin.locate("builtin:countries/documents.jsonl", "test").read_text().splitlines()
    ]
    docs.append({**docs[0], "question": "\n\n".join(texts[:40]) + docs[0]["question"]})  # too long: loses its beginning
    docs_of = {
        "choice": (CHOICE, docs),
        "answer": (ANSWER, docs),
        "text": (TEXT, [{"text": one} for one in [*texts[:3], "\n\n".join(texts[:40])]]),  # the last is longer than 512
    }
    for name, (task, rows) in docs_of.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(task.replace("FILE", str(file)))
    return folder


def evaluate(lm_eval, folder, model, arguments, chat, names=("choice", "answer", "text")):
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[f"countries_{name}" for name in names],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        num_fewshot=0,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_results_are_those_of_hf(lm_eval, tuned, chat):
    """Log-likelihoods of choices within 1e-3, of texts within one millionth; equal accuracies and answers."""
    import sft_jax.evaluation.harness_model  # noqa: F401

    model = tuned / "model"
    theirs = evaluate(lm_eval, tuned, "hf", {"pretrained": str(model), "dtype": "float32", "device": "cpu"}, chat)
    ours = evaluate(lm_eval, tuned, "sft-jax", {"path": str(model), "dtype": "float32"}, chat)
    farthest = dict.fromkeys(("countries_choice", "countries_text"), 0.0)
    for name in farthest:
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert a["doc"] == b["doc"]
            assert a["arguments"] == b["arguments"]
            for (one,), (other,) in zip(a["resps"], b["resps"], strict=True):
                if name == "countries_choice":
                    assert one[1] == other[1]
                    difference = abs(one[0] - other[0])
                else:  # a sum of a thousand float32 is about -2,500, where neighbouring numbers differ by 0.0002
                    difference = abs(one - other) / abs(other)
                farthest[name] = max(farthest[name], difference)
    texts = [[one["resps"][0][0] for one in side["samples"]["countries_answer"]] for side in (ours, theirs)]
    results = [side["results"] for side in (ours, theirs)]
    print("largest difference of log-likelihoods, of texts relative:", farthest)
    for side in results:
        print({f"{name} {key}": value for name, of in side.items() for key, value in of.items() if "," in key})
    print(texts[0][:6])
    assert farthest["countries_choice"] < 1e-3
    assert farthest["countries_text"] < 1e-6
    assert texts[0] == texts[1]
    assert any(texts[0])
    for name, key in (("choice", "acc,none"), ("choice", "acc_norm,none"), ("answer", "exact_match,strip")):
        assert results[0][f"countries_{name}"][key] == results[1][f"countries_{name}"][key]
    perplexities = [side["countries_text"]["word_perplexity,none"] for side in results]
    np.testing.assert_allclose(*perplexities, rtol=1e-4)


def test_the_command(lm_eval, tuned, tmp_path):
    """A run is evaluated without an export; a wrong argument is one line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}

    def run(*arguments):
        command = [sys.executable, "-m", "sft_jax.evaluation.harness", "--model", "sft-jax", *arguments]
        tasks = ["--tasks", "countries_choice", "--include_path", str(tuned), "--batch_size", "8"]
        return subprocess.run([*command, *tasks], env=environment, capture_output=True, text=True, timeout=600)

    done = run("--model_args", f"run={tuned / 'run'},step=40", "--output_path", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "countries_choice" in done.stdout
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["countries_choice"]["acc,none"] > 0.5
    for arguments, words in (
        ("peft=x", "model_args: needs path=FOLDER or run=RUN"),
        (f"path={tuned / 'model'},peft=x", "model_args: unknown argument 'peft'"),
        (f"run={tuned / 'run'},step=7", "no checkpoint of step 7"),
    ):
        failed = run("--model_args", arguments)
        assert failed.returncode == 2, failed.stderr
        assert words in failed.stderr.splitlines()[-1]
        assert "Traceback" not in failed.stderr


def test_generation_kwargs(lm_eval):
    from sft_jax.errors import UserError
    from sft_jax.evaluation.harness_model import _settings
    from sft_jax.inference.sampling import Sampling

    assert _settings({"until": "a", "max_new_tokens": 9}) == (["a"], 9, Sampling())
    assert _settings({"do_sample": False, "temperature": 1.0}) == ([], 256, Sampling())
    assert _settings({"temperature": 0.5, "top_k": 3, "max_gen_toks": 4, "max_tokens": 5}) == ([], 4, Sampling(0.5, 3))
    with pytest.raises(UserError, match="generation_kwargs: 'num_beams' is not supported; supported are do_sample"):
        _settings({"num_beams": 4})
