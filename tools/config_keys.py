"""Writes the tables of config keys in configs/README.md from the dataclasses and comments of sft_jax/config.

    python tools/config_keys.py [--check]

``--check`` writes nothing and fails if the page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import sys
import tokenize
from pathlib import Path
from typing import Any

from sft_jax import config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "configs" / "README.md"
BEGIN, END = "<!-- keys: tools/config_keys.py writes this -->", "<!-- end of keys -->"

# In page order; a source is an entry of data.train, data.eval and evaluation.documents.
SECTIONS = {
    "model": config.ModelConfig,
    "lora": config.LoraConfig,
    "data": config.DataConfig,
    "data.train.N": config.SourceConfig,
    "optimizer": config.OptimizerConfig,
    "training": config.TrainingConfig,
    "evaluation": config.EvaluationConfig,
    "mesh": config.MeshConfig,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{keys()}{END}{after}"
    if options.check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def keys() -> str:
    """Formats a table for each section."""
    texts = comments()
    tables = []
    for section, kind in SECTIONS.items():
        rows = ["", f"**{section}**", "", "| key | default | |", "|---|---|---|"]
        for one in dataclasses.fields(kind):
            text = texts[kind.__name__, one.name].replace("|", "\\|")
            rows.append(f"| `{one.name}` | {default_of(one)} | {text} |")
        tables.append("\n".join(rows))
    return "\n".join(tables).lstrip("\n") + "\n"


def default_of(one: dataclasses.Field[Any]) -> str:
    """Formats a default value as YAML."""
    value = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
    if value == "???":
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{ {None: 'null', True: 'true', False: 'false'}[value] }`".replace("` ", "`").replace(" `", "`")
    return f"`{value}`"


def comments() -> dict[tuple[str, str], str]:
    """Maps class and field names to the comment behind the field."""
    found = {}
    for path in sorted(Path(config.__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        by_line = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        found |= {
            (node.name, field.target.id): by_line[field.end_lineno or 0]
            for node in ast.parse(source).body
            if isinstance(node, ast.ClassDef)
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.end_lineno in by_line
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
