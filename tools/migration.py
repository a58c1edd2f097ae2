"""Writes configs/MIGRATION.md, a table of the keys of each tool and ours, from sft_jax/config_names.

    python tools/migration.py [--check]

``--check`` writes nothing and fails if the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sft_jax.config_names import TOOLS

PAGE = Path(__file__).resolve().parent.parent / "configs" / "MIGRATION.md"
_TEXT = """# Coming from another tool

Written by `python tools/migration.py`. A key of another tool in a config or on the command line is answered with the
line of this table; nothing is renamed silently. Three differences matter most:

- `training.batch_size` counts the packed sequences of a step over **all** devices; `num_microbatches` splits it.
- The loss counts assistant tokens only, with the end-of-turn token, unless `data.train_on` says otherwise. It is
  divided once by all supervised tokens of the step, as TRL does with `average_tokens_across_devices`.
- A run directory resumes by itself; a model folder is written by `sft-jax export`, not while training.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """Formats a table for each tool."""
    parts = [_TEXT]
    for tool, keys in TOOLS.items():
        rows = [f"\n## {tool}\n", "| key | here | |", "|---|---|---|"]
        for key, (ours, note) in keys.items():
            rows.append(f"| `{key}` | {', '.join(f'`{one}`' for one in ours.split(', ')) if ours else '–'} | {note} |")
        parts.append("\n".join(rows) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
