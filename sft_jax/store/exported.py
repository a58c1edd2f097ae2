"""``sft_jax.json`` in an export: which run, step and format it is, so that it need not be written again."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from sft_jax.errors import UserError
from sft_jax.files.json_object import read_object
from sft_jax.hf.peft import ADAPTER_FILE
from sft_jax.hf.reader import TensorReader
from sft_jax.store.opened import OpenedRun
from sft_jax.version import __version__

FILE = "sft_jax.json"


def record(run: OpenedRun, form: str, dtype: str | None) -> dict[str, object]:
    """What identifies an export: no paths, since it is published."""
    trained = None
    if run.digests is not None:
        weights = sorted((name, digest) for name, digest in run.digests.items() if name.startswith("params"))
        lora = run.config.lora
        merging = None if lora is None else [lora.method, lora.rank, lora.alpha]
        trained = sha256(json.dumps([weights, merging, run.fingerprint, run.stop_ids]).encode()).hexdigest()
    return {"sft_jax": __version__, "run": trained, "step": run.step, "format": form, "dtype": dtype}


def write_record(folder: Path, values: dict[str, object]) -> None:
    """Write the record of an export."""
    (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def holds(folder: Path, values: dict[str, object]) -> bool:
    """Whether a folder is the finished export with this record, with weights that can be read.

    Runs of version 0.1 cannot be recognized.
    """
    if values["run"] is None or not (folder / FILE).is_file():
        return False
    try:
        found = read_object(folder / FILE)
        TensorReader(folder, ADAPTER_FILE if values["format"] == "adapter" else "model.safetensors")
    except UserError:
        return False
    return found == values
