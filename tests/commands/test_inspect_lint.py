"""``sft-jax inspect --lint`` in text, JSON, HTML and Python; ``data.leave_out`` in inspect, train and resume."""

import json

import numpy as np
import pytest
import yaml
from kit import conversations, run_config, sft_jax, write_jsonl

import sft_jax as library
from sft_jax import config_file
from sft_jax.data.lint.leave_out import _check_all_agree
from sft_jax.distributed import processes
from sft_jax.errors import UserError

KEY = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1"


@pytest.fixture
def config(tiny, tmp_path):
    """Sixty conversations: row 21 is row 20, row 30 has a key, row 40 is also held out."""
    rows = conversations(60)
    rows[21] = rows[20]
    rows[30]["messages"][-1]["content"] = f"Use {KEY}, please."
    made = run_config(tiny, write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "run")
    values = config_file.to_dict(made)
    values["data"]["eval"] = [{"path": str(write_jsonl(tmp_path / "eval.jsonl", [rows[40], *conversations(9, 7)]))}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "config.yaml"


def inspected(*arguments):
    done = sft_jax("inspect", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_json_has_the_lint_behind_the_summary(config):
    summary, lint, *rows = inspected(config, "--lint")
    plain = inspected(config)
    assert summary == plain[0]
    assert rows == plain[1:]
    lint = lint["lint"]
    assert set(lint) == {"examples", "held_out", "findings", "nothing", "not_checked"}
    assert (lint["examples"], lint["held_out"], lint["not_checked"]) == (60, 10, {})
    found = {one["name"]: one for one in lint["findings"]}
    train, held_out = f"{config.parent}/a.jsonl", f"{config.parent}/eval.jsonl"
    assert found["exact_duplicates"]["rows"] == {train: [21]}
    assert found["secrets"]["rows"] == {train: [30]}
    assert found["leaks"]["rows"] == {held_out: [0]}
    assert found["leaks"]["shown"] == [
        {
            "source": held_out,
            "row": 0,
            "note": f"the same conversation as {train} row 40",
            "text": found["leaks"]["shown"][0]["text"],
        }
    ]
    assert (found["leaks"]["of"], found["secrets"]["of"]) == ("held-out", "training")
    assert (found["leaks"]["share"], found["secrets"]["share"]) == (1 / 10, 1 / 60)
    for one in lint["findings"]:
        assert one["count"] == sum(map(len, one["rows"].values()))
        assert one["certainty"] in ("defect", "guess", "fact")
        assert all(len(row["text"]) < 150 for row in one["shown"])
        assert not one["is_left_out"]
    assert not set(lint["nothing"]) & set(found)


def test_text_page_and_python_say_the_same(config, capsys):
    page = config.parent / "page.html"
    done = sft_jax("inspect", config, "--lint", "--rows", "0", "--html", page)
    assert done.returncode == 0, done.stderr
    text, html = done.stdout, page.read_text()
    for part in (
        "lint of 60 training and 10 held-out examples",
        f"{config.parent}/a.jsonl row 21: as {config.parent}/a.jsonl row 20",
        "Hugging Face token hf_a…",
        "(data.leave_out: [secrets])",
    ):
        assert part in text
    for part in ("<h2>Lint</h2>", "exact duplicates", f"{config.parent}/a.jsonl row 21", "hf_a…"):
        assert part in html
    assert KEY[:9] not in text.split("lint of")[1] + html.split("<h2>Lint</h2>")[1].split("<h2>Loss mask</h2>")[0]
    without = library.load_config(config, ["data.eval=[]"])
    lint = library.inspect(without, rows=0, lint=True)["lint"]
    assert lint["not_checked"] == {"leaks": "data.eval is empty"}
    assert "not looked for: leaks, because data.eval is empty" in capsys.readouterr().out
    assert "lint" not in library.inspect(without, rows=0)
    capsys.readouterr()


def test_inspect_and_train_leave_out_the_same(config):
    names = "data.leave_out=[exact_duplicates, leaks, secrets]"
    summary, lint, *rows = inspected(config, "--lint", names)
    summary = summary["summary"]
    assert summary["kept"] == 57
    assert summary["dropped"] == {
        "leaks (data.leave_out)": 1,
        "secrets (data.leave_out)": 1,
        "exact duplicates (data.leave_out)": 1,
    }
    assert summary["sources"][0]["left_out"] == {"leaks": 1, "secrets": 1, "exact_duplicates": 1}
    assert [row["row"] for row in rows] == [i for i in range(60) if i not in (21, 30, 40)]
    assert summary["tokens"] == sum(len(row["input_ids"]) for row in rows)
    found = {one["name"]: one["is_left_out"] for one in lint["lint"]["findings"]}
    assert found["secrets"]
    assert found["leaks"]
    trained = sft_jax("train", config, names, "training.max_steps=null", "training.num_train_epochs=1")
    assert trained.returncode == 0, trained.stderr
    assert "left out  1 leaks, 1 secrets, 1 exact duplicates" in trained.stderr
    assert f"57 of 60 rows, {summary['tokens']:,} tokens" in trained.stderr
    assert "too long" not in trained.stderr
    metrics = library.Run(config.parent / "run").metrics
    losses = [row for row in metrics if "loss" in row]
    assert sum(row["target_tokens"] for row in losses) == summary["targets"]
    assert len(losses) == summary["steps_per_epoch"]
    other = sft_jax("train", config, "training.max_steps=null", "training.num_train_epochs=1")
    assert other.returncode == 2
    assert "holds a run with data.leave_out=" in other.stderr


def test_near_duplicates_take_the_exact_ones_with_them(config):
    summary, lint = inspected(config, "--lint", "data.leave_out=[near_duplicates]", "--rows", "0")
    assert summary["summary"]["sources"][0]["left_out"]["exact_duplicates"] == 1
    found = {one["name"]: one["is_left_out"] for one in lint["lint"]["findings"]}
    assert found["exact_duplicates"]
    assert not found["secrets"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.leave_out=[duplicates]"], "data.leave_out: 'duplicates' is not one of exact_duplicates, near_dupl"),
        (["data.leave_out=[secrets]", "data.streaming=true"], "data.leave_out: a stream cannot compare its rows; set"),
        (["--lint", "data.streaming=true"], "--lint: compares all rows with each other; set data.streaming=false"),
        (["data.leave_out=[leaks]", "data.eval=[]"], "data.leave_out: leaks are looked for in held-out data; set"),
    ],
)
def test_refusals(config, arguments, message):
    done = sft_jax("inspect", config, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    if arguments[0] != "--lint":
        assert message in sft_jax("train", config, *arguments).stderr.splitlines()[-1]


def test_bad_rows_are_refused_before_anything_is_left_out(config):
    rows = [*conversations(3), {"messages": [{"role": "user", "content": "a"}]}]
    path = write_jsonl(config.parent / "bad.jsonl", rows)
    data = [f"data.train=[{{path: {path}}}]", "data.leave_out=[exact_duplicates]"]
    by_inspect, by_train = (sft_jax(command, config, *data) for command in ("inspect", "train"))
    assert by_inspect.returncode == by_train.returncode == 2
    assert by_inspect.stderr.splitlines()[-1] == by_train.stderr.splitlines()[-1]
    assert "bad.jsonl row 3" in by_inspect.stdout


def test_processes_have_to_leave_out_the_same_rows(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda name, value, wait: [value, value])
    _check_all_agree(np.zeros(3, bool))
    monkeypatch.setattr(processes, "gather", lambda name, value, wait: [value, "another"])
    with pytest.raises(UserError, match=r"^data\.leave_out: the processes do not find the same rows"):
        _check_all_agree(np.zeros(3, bool))
