"""The model card of an export, from what the run directory and the base model say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_jax.hf.card import Exported, license_of, model_card
from sft_jax.hf.hub import find_card
from sft_jax.models.architecture import Architecture
from sft_jax.store.metrics import read_metrics
from sft_jax.store.opened import OpenedRun


def card_of(run: OpenedRun, form: str, arch: Architecture, name: str) -> str:
    """Returns the ``README.md``.

    Args:
        name: what the export is loaded by: ``USER/REPO``, or the name of its folder.
    """
    metrics, measured_on = _results(run)
    model = Exported(
        name=name,
        form=form,
        step=run.step,
        dtype=run.dtype(arch.embeddings_tensor),
        multimodal=arch.is_part,
        chat=run.tokenizer.chat_template is not None,
        metrics=read_metrics(run.folder.local / "metrics.jsonl"),
        results=metrics,
        measured_on=measured_on,
        license=license_of(find_card(run.config.model.path, run.base)),
    )
    return model_card(run.config, model)


def rename_card(folder: Path, card: Callable[[str], str], name: str) -> None:
    """Write the card of a finished export for another name, unless a person has changed it.

    Args:
        card: makes the card for a name.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    found = re.search(r'^name = "(.+)"$', text, re.MULTILINE)
    if found is not None and text == card(found[1]):
        path.write_text(card(name), encoding="utf-8")


def _results(run: OpenedRun) -> tuple[dict[str, Any], list[str]]:
    """The metrics of the tuned model and their data, if it was evaluated at this step; version 0.1 did not say."""
    path = run.folder.local / "report" / "tuned.json"
    if not path.is_file():
        return {}, []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a damaged report is no reason to refuse an export
        return {}, []
    if not isinstance(report, dict) or report.get("step") != run.step or not report.get("data"):
        return {}, []
    return report["metrics"], report["data"]
