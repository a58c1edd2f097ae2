"""Writes the model card of an export: metadata that the Hub reads, code to use it, data, settings and losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_jax.adapters.attach import described
from sft_jax.config import Config, SourceConfig
from sft_jax.config_yaml import BYTES, check_yaml
from sft_jax.errors import UserError
from sft_jax.files.json_object import read_bytes
from sft_jax.version import __version__

_MASKS = {
    "assistant": "every assistant turn, including its stop token",
    "last_assistant": "the last assistant turn, including its stop token",
    "all": "every token",
}
_LICENSE_KEYS = ("license", "license_name", "license_link")
_LONGEST_TEXT = 300  # characters of a license's name or link
# Metrics of an evaluation that the Hub shows, by the name that it knows them by.
_METRICS = {
    "exact_match": ("exact_match", "exact match"),
    "token_accuracy": ("accuracy", "token accuracy"),
    "stop_rate": ("stop_rate", "answers that stop"),
    "loss": ("loss", "loss per supervised token (nats)"),
    "perplexity": ("perplexity", "perplexity of the answers"),
}


@dataclass(frozen=True)
class Exported:
    """What is exported, and what is known about it besides the config.

    Attributes:
        name: what it is loaded by: ``USER/REPO``, or the name of the folder.
        form: ``adapter`` or ``merged``.
        dtype: dtype of the base model's weights.
        multimodal: whether the base model has parts besides the decoder, which were not trained.
        chat: whether the tokenizer has a chat template.
        metrics: the rows of ``metrics.jsonl``.
        results: the metrics of the tuned model in ``report/tuned.json``; empty if this step was not evaluated.
        measured_on: paths or ids of the data of ``results``.
        license: the metadata about the license in the base model's card.
    """

    name: str
    form: str
    step: int
    dtype: Any
    multimodal: bool = False
    chat: bool = True
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: Mapping[str, Any] = field(default_factory=dict)
    measured_on: Sequence[str] = ()
    license: Mapping[str, str] = field(default_factory=dict)


def model_card(config: Config, model: Exported) -> str:
    """Returns a ``README.md`` with the metadata that model hubs read."""
    base, lora, optimizer = config.model.path, config.lora, config.optimizer
    base_name = _public_name(base)
    method = f"{described(lora)}, on {_targets(lora.target_modules)}" if lora else "full fine-tuning"
    if model.multimodal:
        method += ", of the text decoder only"
    if config.model.quantization:
        method += f", base quantized to {config.model.quantization}"
    if config.model.compute:
        method += f", products of linear layers in {config.model.compute}"
    step = model.step
    rows = {
        "base model": f"`{base_name}` ({model.dtype})",
        "license of the base model": model.license.get("license_name") or model.license.get("license") or "not known",
        "method": method,
        "data": _names(config.data.train),
        "loss on": _MASKS[config.data.train_on],
        "longest example": f"{config.data.max_length} tokens ({config.data.overlong} beyond)",
        "steps": f"{step} of {config.training.batch_size} sequences × {config.data.max_length} tokens"
        + (", packed" if config.data.packing else ""),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g} ({optimizer.schedule}, warm-up "
        f"{optimizer.warmup_ratio:g}), weight decay {optimizer.weight_decay:g}, clip {optimizer.max_grad_norm}",
        "compute dtype": config.model.dtype,
        "seed": str(config.training.seed),
        "training loss": _last(model.metrics, "loss", step),
        "held-out loss": _last(model.metrics, "eval_loss", step),
    }
    lines = ["---", _metadata(config, model), "---", "", f"# {model.name.rpartition('/')[2]}", ""]
    lines += [f"`{base_name}`, fine-tuned on {_names(config.data.train)}.", "", "```python", *_usage(model), "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    lines += ["", "Losses are nats per target token.", ""]
    if measured := _measured(model.results):
        lines += [
            f"On {_listed(model.measured_on)}:",
            "",
            "| | |",
            "|---|---|",
        ]
        lines += [f"| {text} | {value:.4g} |" for _, text, value in measured] + [""]
    lines += [f"Made with sft-jax {__version__}.", ""]
    return "\n".join(lines)


def license_of(path: Path | None) -> dict[str, str]:
    """Returns the metadata about the license in the card of a base model; empty if there is none that is usable."""
    import yaml

    if path is None:
        return {}
    try:
        text = read_bytes(path, BYTES).decode()
        front = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
        if front is None:
            return {}
        check_yaml(front[1], str(path))
        values = yaml.safe_load(front[1])
    except (UserError, UnicodeDecodeError, yaml.YAMLError):  # what others wrote for people; nothing depends on it
        return {}
    if not isinstance(values, dict):
        return {}
    found = {key: values.get(key) for key in _LICENSE_KEYS}
    return {key: one for key, one in found.items() if isinstance(one, str) and _is_line(one)}


def _is_line(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_TEXT and text.isprintable() and "|" not in text


def _metadata(config: Config, model: Exported) -> str:
    """The front matter, see https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import EvalResult, ModelCardData

    base = config.model.path
    is_id = _is_id(base)
    datasets = list(dict.fromkeys(one.path for one in config.data.train if _is_id(one.path)))
    held_out = [_public_name(path) for path in model.measured_on]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=held_out[0],
            dataset_name=", ".join(held_out),
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for kind, name, value in _measured(model.results)
    ]
    license: dict[str, Any] = dict(model.license)
    if license.get("license_name") and "license" not in license:
        license["license"] = "other"
    data = ModelCardData(
        library_name="peft" if model.form == "adapter" else "transformers",
        pipeline_tag="image-text-to-text" if model.multimodal else "text-generation",
        base_model=base if is_id else None,
        base_model_relation=("adapter" if model.form == "adapter" else "finetune") if is_id else None,
        datasets=datasets or None,
        tags=["sft", "sft-jax", *(["lora"] if config.lora else [])],
        model_name=model.name.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **license,
    )
    return data.to_yaml()


def _measured(results: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Type, name and value of the metrics that the Hub shows."""
    return [(*_METRICS[key], float(results[key])) for key in _METRICS if isinstance(results.get(key), int | float)]


def _public_name(path: str) -> str:
    """Returns a Hugging Face id unchanged, and only the last component of a local path, which is private."""
    return path if _is_id(path) else Path(path).name


def _is_id(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()


def _names(sources: list[SourceConfig]) -> str:
    return _listed([source.path for source in sources])


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(f"`{_public_name(path)}`" for path in paths)


def _targets(targets: Any) -> str:
    return "all linear layers" if targets == "all-linear" else ", ".join(f"`{target}`" for target in targets)


def _last(metrics: list[dict[str, Any]], key: str, step: int) -> str:
    values = [row[key] for row in metrics if row.get(key) is not None and row["step"] <= step]
    return f"{values[0]:.4f} → {values[-1]:.4f}" if values else "not measured"


def _usage(model: Exported) -> list[str]:
    """Python code that loads the export and generates."""
    if model.multimodal:
        loader = "AutoModelForImageTextToText"
    else:
        loader = "AutoPeftModelForCausalLM" if model.form == "adapter" else "AutoModelForCausalLM"
    lines, load = [f"from transformers import {loader}, AutoTokenizer"], [f"model = {loader}.from_pretrained(name)"]
    if model.form == "adapter" and model.multimodal:
        lines.insert(0, "from peft import PeftConfig, PeftModel")
        base = f"{loader}.from_pretrained(PeftConfig.from_pretrained(name).base_model_name_or_path)"
        load = [f"model = PeftModel.from_pretrained({base}, name)"]
    elif model.form == "adapter":
        lines = [f"from peft import {loader}", "from transformers import AutoTokenizer"]
    lines += ["", f'name = "{model.name}"', "tokenizer = AutoTokenizer.from_pretrained(name)", *load]
    if model.chat:
        lines += [
            'messages = [{"role": "user", "content": "Hello!"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    return [
        *lines,
        "output = model.generate(**inputs, max_new_tokens=128)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
