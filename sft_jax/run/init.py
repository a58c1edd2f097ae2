"""Writes a config for a model and data: looks at both, proposes values with reasons, and asks ``plan`` if it fits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sft_jax import config_file as configs
from sft_jax.config import Config, DataConfig, SourceConfig
from sft_jax.data.read.sources import open_sources, with_likely_columns
from sft_jax.data.tokens.prepare import Prepared, read_data
from sft_jax.errors import UserError
from sft_jax.files.flush import write_whole
from sft_jax.hf.config import read_architecture, stop_ids
from sft_jax.hf.hub import absolute, find_model
from sft_jax.hf.tokenizer import load_tokenizer
from sft_jax.models.architecture import Architecture
from sft_jax.planning.plan import plan
from sft_jax.planning.proposal import Choice, Facts, propose
from sft_jax.planning.topology import parse_topology
from sft_jax.run.announce import Announcer
from sft_jax.sharding import make_mesh
from sft_jax.training.weights import build

_ROWS = 20_000  # of each file that are read to propose lengths
_CHATML = {"data.chat_template": "builtin:chatml.jinja", "data.added_tokens": ["<|im_start|>", "<|im_end|>"]}


def init(
    model: str, data: str, heldout: str | None = None, method: str = "lora", hardware: str | None = None, out: str = ""
) -> Path:
    """Write a short commented config for a model and data, and say what to run next; returns its path.

    Reads the model's config and tokenizer, no weights, and up to 20,000 rows of each file.

    Args:
        model: a folder, a Hugging Face id, or ``builtin:tiny``.
        data, heldout: as ``data.train.0.path`` and ``data.eval.0.path``.
        method: one of :data:`sft_jax.planning.proposal.METHODS`.
        hardware: compile the step for it, such as ``v5e-8`` or ``rtx-4090:1``; by default, the devices of this machine
            are assumed, and nothing is compiled.
        out: the file to write; by default named after the data.

    Raises:
        UserError: the model or the data cannot be used, or the file exists.
    """
    say = Announcer(True)
    path = Path(out or f"{re.sub(r'[^A-Za-z0-9_-]+', '-', Path(data).stem).strip('-') or 'sft'}.yaml")
    if path.exists():
        raise UserError(f"--out: {path} exists; name another file")
    where = None if hardware is None else parse_topology(re.sub(r"-(\d+)$", r":\1", hardware), "--hardware")

    # -- model --------------------------------------------------------------------------------------------------------
    folder = find_model(model, asked_by="--model", weights=False)
    arch = read_architecture(folder)
    tokenizer, _ = load_tokenizer(folder)
    choices = [Choice("model.path", absolute(model), "")]
    source = with_likely_columns(SourceConfig(path=data))
    is_chat = open_sources([source])[0].format not in ("text", "tokens")
    if is_chat and not tokenizer.chat_template:
        choices += [Choice(key, value, "the tokenizer has no chat template") for key, value in _CHATML.items()]
        template, tokens = _CHATML.values()
        tokenizer, _ = load_tokenizer(folder, str(template), list(tokens))

    # -- data ---------------------------------------------------------------------------------------------------------
    settings = DataConfig(train=[dataclasses.replace(source, max_rows=_ROWS)], max_length=max(2, arch.max_positions))
    prepared = read_data(settings, settings.train, tokenizer, stop_ids(folder))
    choices += _data_choices(source, heldout, prepared)
    say.data("data", prepared)

    # -- values -------------------------------------------------------------------------------------------------------
    name = path.stem
    choices.append(Choice("training.output_dir", f"runs/{name}", "run the same command again to resume"))
    num_devices = where.num_devices if where is not None else jax.device_count()
    facts = _facts(arch, prepared, num_devices)
    say("model", f"{arch.family}, {facts.num_weights / 1e6:,.0f} million weights, {arch.max_positions:,} positions")
    choices += [one for one in propose(facts, method) if heldout is not None or one.key != "training.eval_every"]
    choices.append(Choice("training.num_microbatches", "auto", "the fewest that fit in memory, found by compiling"))
    header = f"# {_method_name(method)} of {model} on {data}"
    if where is not None:
        choices, verdict = _planned(choices, str(where), folder)
        header += f"\n# plan {where}: {verdict}"
        say("plan", f"{where}: {verdict}")
    text = f"{header}\n#\n#   sft-jax inspect {path}\n#   sft-jax train {path}\n\n{as_yaml(choices)}"
    write_whole(path, text)
    configs.load(path)
    for one in choices:
        if one.reason:
            say("", f"{one.key} = {_value(one.value)}   {one.reason}")
    if heldout is None:
        say("held out", "none; with --eval FILE the run also measures the loss on examples that it does not train on")
    say("wrote", str(path))
    say("next", f"sft-jax inspect {path}, then sft-jax train {path}")
    return path


def _method_name(method: str) -> str:
    return {"lora": "LoRA", "qlora": "QLoRA", "full": "Full fine-tuning"}[method]


def _data_choices(source: SourceConfig, heldout: str | None, prepared: Prepared) -> list[Choice]:
    """The sources, and whether bad rows are left out."""
    report = prepared.report
    guessed = ", columns guessed from their names" if source.columns else ""
    choices = [Choice("data.train", [_entry(source)], f"format {report.sources[0].format}{guessed}")]
    if heldout is not None:
        held_out = with_likely_columns(SourceConfig(path=heldout))
        choices.append(Choice("data.eval", [_entry(held_out)], "its loss shows overfitting"))
    if not report.total("kept"):
        first = next((one.reasons[0].at(one.name) for one in report.sources if one.reasons), "no row can be used")
        raise UserError(f"--data: {first}")
    if refused := report.total("refused"):
        choices.append(Choice("data.on_bad_row", "skip", f"{refused:,} rows cannot be used; inspect lists why"))
    return choices


def _entry(source: SourceConfig) -> dict[str, Any]:
    return {"path": source.path, **({"columns": dict(source.columns)} if source.columns else {})}


def _facts(arch: Architecture, prepared: Prepared, num_devices: int) -> Facts:
    examples, report = prepared.examples, prepared.report
    rows = sum(len(source.table) for source in prepared.sources)
    split = build(arch, make_mesh(devices=jax.devices()[:1]), None, "bfloat16", "none")
    return Facts(
        sum(leaf.size for leaf in split.base().values()),
        arch.max_positions,
        np.asarray(examples.lengths),
        report.total("targets"),
        round(len(examples) * rows / max(1, report.total("rows"))),
        num_devices,
    )


def _planned(choices: list[Choice], topology: str, folder: Path) -> tuple[list[Choice], str]:
    """Compile the step, and change what has to change for it to fit; returns the choices and the verdict."""
    config: Config = configs.from_dict(nested(choices))
    try:
        result = plan(config, topology, folder / "config.json", quiet=True)
    except UserError as error:
        return choices, f"not compiled: {error}"
    found = f"remat {result['remat']}, {result['num_microbatches']} microbatch(es)"
    peak = "" if result["peak_bytes"] is None else f", peak {result['peak_bytes'] / 2**30:.1f}"
    peak += f" of {result['usable_bytes'] / 2**30:.1f} GiB a chip" if peak else ""
    if result["fits"]:
        return choices, f"fits{peak}, {found}"
    advice = result.get("advice") or {}
    if not advice.get("changes") or advice["topology"] != topology:
        more = f"; it needs {advice['topology']}" if advice.get("changes") is not None else ""
        return choices, f"does not fit{peak}{more}; try --qlora, a smaller data.max_length, or a smaller model"
    changes = dict(change.split("=", 1) for change in advice["changes"].split())
    kept = [one for one in choices if one.key not in changes]
    parsed = [Choice(key, _parsed(value), f"so that it fits on {topology}") for key, value in changes.items()]
    return [*kept, *parsed], f"fits, peak {advice['peak_bytes'] / 2**30:.1f} GiB a chip, with {advice['changes']}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def nested(choices: list[Choice]) -> dict[str, Any]:
    """The values of choices as nested dicts."""
    tree: dict[str, Any] = {}
    for one in choices:
        section, _, key = one.key.partition(".")
        if key:
            tree.setdefault(section, {})[key] = one.value
        else:
            tree[section] = one.value
    return tree


def as_yaml(choices: list[Choice]) -> str:
    """The choices as YAML in the order of sections, each with its reason as a comment.

    >>> print(as_yaml([Choice("data.train", [{"path": "a.jsonl"}], "format text"), Choice("lora.rank", 16, "")]))
    lora:
      rank: 16
    <BLANKLINE>
    data:
      train: [{path: a.jsonl}]  # format text
    <BLANKLINE>
    """
    sections: dict[str, list[str]] = {}
    for one in choices:
        section, _, key = one.key.partition(".")
        comment = f"  # {one.reason}" if one.reason else ""
        if key:
            sections.setdefault(section, [f"{section}:"]).append(f"  {key}: {_value(one.value)}{comment}")
        else:
            sections[section] = [f"{section}: {_value(one.value)}{comment}"]
    order = [one.name for one in dataclasses.fields(Config)]
    return "\n\n".join("\n".join(sections[name]) for name in sorted(sections, key=order.index)) + "\n"


def _value(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(key)}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return f"{value:.1e}" if value < 1e-3 else repr(value)  # without a dot, YAML reads text
    words = ("null", "true", "false", "yes", "no", "on", "off")
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./:-]*", value) and value.lower() not in words:
        return value
    return json.dumps(value, ensure_ascii=False)
