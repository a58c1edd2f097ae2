"""The notebooks and the script in tools/notebooks run and print the expected results."""

import ast
import json
import subprocess
import sys

import pytest
from kit import ROOT, child_environment

pytestmark = pytest.mark.drill("tools/notebooks", "sft_jax/api.py", "sft_jax/run", "configs/quickstart.yaml")
NOTEBOOKS = sorted((ROOT / "tools" / "notebooks").glob("*.ipynb"))

# Runs the cells in order, as a notebook kernel does; shows the last expression of a cell, as HTML if possible.
_KERNEL = """
import ast, json, sys
names = {"__name__": "__main__"}
for source in json.load(open(sys.argv[1])):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        print("OUT", shown._repr_html_()[:60] if hasattr(shown, "_repr_html_") else repr(shown))
"""


# What stands in for a model and data of the Hub.
_STAND_INS = {
    '"Qwen/Qwen3-0.6B"': '"builtin:tiny"',
    '"openai/gsm8k"': '"builtin:countries/train.jsonl"',
    'NAME = "main"': "NAME = None",
    '"max_steps": 100': '"max_steps": 60',
    "2e-4": "5e-4",
    "Ann has 3 bags of 12 apples. How many has she?": "What is the capital of Peru?",
}


def code_of(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells), "notebooks are kept without outputs"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if notebook.stem == "colab_kaggle":
        assert all(any(name in cell for cell in code) for name in _STAND_INS)
        for name, stand_in in _STAND_INS.items():
            code = [cell.replace(name, stand_in) for cell in code]
    return code


def run_in(folder, *command):
    (folder / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=child_environment(XLA_FLAGS=""), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_cell_is_python():
    assert len(NOTEBOOKS) == 4
    for notebook in NOTEBOOKS:
        for source in code_of(notebook):
            ast.parse(source)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks(notebook, tmp_path):
    (tmp_path / "cells.json").write_text(json.dumps(code_of(notebook)))
    said = run_in(tmp_path, "-c", _KERNEL, "cells.json")
    outs = [line for line in said.splitlines() if line.startswith("OUT ")]
    expected = {
        "colab_kaggle": ["OUT (['cpu'], 'float32')", "OUT <div><code>runs/colab</code>", "Lima", "'model.safetensors'"],
        "quickstart": ["OUT <div><code>runs/tour</code>", "Bishkek"],
        "your_model_and_data": ["OUT <div><code>runs/own</code>", "would rather not say"],
        "export_and_compare": ["'model.safetensors'"],
    }
    for words in expected[notebook.stem]:
        assert any(words in line for line in outs), (words, outs)


def test_script_without_a_main_guard(tmp_path):
    said = run_in(tmp_path, str(ROOT / "tools" / "notebooks" / "quickstart.py"))
    assert "Bishkek" in said
    assert (tmp_path / "runs" / "script-merged" / "model.safetensors").is_file()
