"""The house: small files, small functions, pages that are up to date, words of the field."""

import ast
import re
import subprocess
import sys

import pytest
from kit import ROOT

CODE = sorted(path for room in ("sft_jax", "tests", "tools") for path in (ROOT / room).rglob("*.py"))
PAGES = sorted(path for path in ROOT.rglob("*.md") if not set(path.relative_to(ROOT).parts) & {"runs", "build"})


def test_no_file_over_350_lines_and_no_function_over_80():
    for path in CODE:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, (path, node.name)


def test_readme_is_for_ten_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_links_between_pages_work():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), (page, link)


def test_the_page_of_keys_is_that_of_the_dataclasses():
    done = subprocess.run([sys.executable, ROOT / "tools" / "config_keys.py", "--check"], check=False)
    assert done.returncode == 0, "run python tools/config_keys.py"


@pytest.mark.parametrize("package", ["families", "adapters"])
def test_guides_name_files_that_are_there(package):
    folder = ROOT / "sft_jax" / ("models/families" if package == "families" else "adapters")
    guide = (folder / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.py" for name in re.findall(r"`(\w+)\.py`", guide)} <= {path.name for path in folder.iterdir()} | {
        "architecture.py",
        "stages.py",
        "cache.py",
    }


# Words that the glossary of the project replaces, where a person reads them: code, messages, configs, pages.
RETIRED = {
    r"token tables?": "embeddings",
    r"output heads?": "lm_head",
    r"low[- ]rank": "LoRA",
    r"\bslots?\b": "tokens, positions",
    r"dealt out": "sharded",
    r"\bgo(es|ing)? on\b": "resume, continue",
    r"whole state": "state",
    r"the day that": "date",
    r"need not be there": "ahead of time",
    r"read back": "dequantized",
    r"the last so many": "the newest N",
    r"run folders?": "run directory",
    r"quantis": "quantiz",
    r"mistakes? of the user": "user error",
    r"gradient_accumulation_steps": "num_microbatches",
    r"mosaic_gpu": "",
}
# What keeps a retired word: fields that other tools rely on, names of other libraries, answers to the old names.
ALLOWED = r"slot_tokens|gradient_accumulation_steps\"|gradient_accumulation_steps=4|`training\.gradient_accumulation"


def test_words_of_the_glossary():
    readers = [*CODE, *PAGES, *sorted((ROOT / "configs").rglob("*.yaml"))]
    found = []
    for path in readers:
        if path == ROOT / "tests" / "commands" / "test_house.py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = re.sub(ALLOWED, "", line)
            found += [
                f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, say {instead!r}"
                for word, instead in RETIRED.items()
                if (match := re.search(word, text, re.IGNORECASE))
            ]
    assert not found, "\n".join(found[:20])
