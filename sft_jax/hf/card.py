"""Writes the model card of an export: base model, data, settings and losses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sft_jax.adapters.attach import described
from sft_jax.config import Config
from sft_jax.version import __version__

_MASKS = {
    "assistant": "every assistant turn, including its stop token",
    "last_assistant": "the last assistant turn, including its stop token",
    "all": "every token",
}


def model_card(
    config: Config, form: str, step: int, metrics: list[dict[str, Any]], dtype: Any, multimodal: bool = False
) -> str:
    """Returns a ``README.md`` with the metadata that model hubs read.

    Args:
        form: ``adapter`` or ``merged``.
        metrics: the rows of ``metrics.jsonl``.
        dtype: dtype of the base model's weights.
        multimodal: whether the base model has parts besides the decoder, which were not trained.
    """
    base, lora, optimizer = config.model.path, config.lora, config.optimizer
    front = {"library_name": "peft" if form == "adapter" else "transformers", "pipeline_tag": "text-generation"}
    if multimodal:
        front["pipeline_tag"] = "image-text-to-text"
    if _public_name(base) == base:
        front["base_model"] = base
    front["tags"] = "[sft, sft-jax, lora]" if lora else "[sft, sft-jax]"
    base_name = _public_name(base)
    data = ", ".join(f"`{_public_name(source.path)}`" for source in config.data.train)
    method = f"{described(lora)}, on {_targets(lora.target_modules)}" if lora else "full fine-tuning"
    if multimodal:
        method += ", of the text decoder only"
    if config.model.quantization:
        method += f", base quantized to {config.model.quantization}"
    rows = {
        "base model": f"`{base_name}` ({dtype})",
        "method": method,
        "data": data,
        "loss on": _MASKS[config.data.train_on],
        "longest example": f"{config.data.max_length} tokens ({config.data.overlong} beyond)",
        "steps": f"{step} of {config.training.batch_size} sequences × {config.data.max_length} tokens"
        + (", packed" if config.data.packing else ""),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g} ({optimizer.schedule}, warm-up "
        f"{optimizer.warmup_ratio:g}), weight decay {optimizer.weight_decay:g}, clip {optimizer.max_grad_norm}",
        "compute dtype": config.model.dtype,
        "seed": str(config.training.seed),
        "training loss": _last(metrics, "loss", step),
        "held-out loss": _last(metrics, "eval_loss", step),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "---", ""]
    lines += [f"# {base_name}, fine-tuned", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += [
        "",
        "Losses are nats per target token. " + _usage(form, multimodal),
        "",
        f"Made with sft-jax {__version__}.",
        "",
    ]
    return "\n".join(lines)


def _public_name(path: str) -> str:
    """Returns a Hugging Face id unchanged, and only the last component of a local path, which is private."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    return path if is_id else Path(path).name


def _targets(targets: Any) -> str:
    return "all linear layers" if targets == "all-linear" else ", ".join(f"`{target}`" for target in targets)


def _last(metrics: list[dict[str, Any]], key: str, step: int) -> str:
    values = [row[key] for row in metrics if row.get(key) is not None and row["step"] <= step]
    return f"{values[0]:.4f} → {values[-1]:.4f}" if values else "not measured"


def _usage(form: str, multimodal: bool) -> str:
    if multimodal:
        load = "`transformers.AutoModelForImageTextToText.from_pretrained`"
        if form == "adapter":
            return f"Load the base model with {load}, and the adapter with `peft.PeftModel.from_pretrained`."
        return f"Load it with {load} on this folder."
    if form == "adapter":
        return "Load it with `peft.AutoPeftModelForCausalLM.from_pretrained` on this folder."
    return "Load it with `transformers.AutoModelForCausalLM.from_pretrained` on this folder."
