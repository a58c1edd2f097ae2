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


def code_of(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells), "notebooks are kept without outputs"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_in(folder, *command):
    (folder / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=child_environment(XLA_FLAGS=""), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_cell_is_python():
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        for source in code_of(notebook):
            ast.parse(source)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks(notebook, tmp_path):
    (tmp_path / "cells.json").write_text(json.dumps(code_of(notebook)))
    said = run_in(tmp_path, "-c", _KERNEL, "cells.json")
    outs = [line for line in said.splitlines() if line.startswith("OUT ")]
    expected = {
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
