"""Config keys of other tools and of earlier versions, and what takes their place here. One file a tool."""

from __future__ import annotations

from sft_jax.config_names import axolotl, earlier, llama_factory, maxtext, trl, tunix, unsloth

TOOLS = {
    "TRL, transformers and PEFT": trl.KEYS,
    "Axolotl": axolotl.KEYS,
    "LLaMA-Factory": llama_factory.KEYS,
    "Unsloth": unsloth.KEYS,
    "Tunix": tunix.KEYS,
    "MaxText": maxtext.KEYS,
}
"""Maps a key of a tool to ours, and to a note where the meaning differs. Without a key of ours, the note says why.

A name that ends with ``*`` stands for all that begin with it.
"""

# What a section is taken for if it is given a single value.
SECTIONS = {"model": "model.path", "data": "data.train", "lora": "lora.rank", "optimizer": "optimizer.name"}

# Names that also exist here, but in a section.
_SECTION_OF = {
    "optimizer": ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio"),
    "training": ("num_train_epochs", "max_steps", "batch_size", "output_dir", "seed", "num_microbatches", "run_name"),
    "data": ("packing", "max_length", "chat_template", "train_on", "streaming", "added_tokens"),
    "model": ("dtype", "attention", "quantization", "remat"),
    "lora": ("rank", "alpha", "target_modules"),
}


def suggest_key(key: str) -> str | None:
    """What to use instead of an unknown key, looked up by its last part; None if no known tool has it.

    >>> suggest_key("training.per_device_train_batch_size")
    'use training.batch_size, sequences per step over all devices'
    >>> suggest_key("neftune_noise_alpha")
    'there is no such key: noise on embeddings (NEFTune) is not available'
    """
    name = key.rpartition(".")[2]
    found = _find(name)
    if found is None or found[0] == key:
        return None
    ours, note = found
    if not ours:
        return f"there is no such key: {note}"
    return f"use {ours}" + (f", {note}" if note else "")


def _find(name: str) -> tuple[str, str] | None:
    tables = [earlier.KEYS, *TOOLS.values()]
    exact = next((table[name] for table in tables if name in table), None)
    if exact is not None:
        return exact
    section = next((section for section, names in _SECTION_OF.items() if name in names), None)
    if section is not None:
        return f"{section}.{name}", ""
    starts = (pair for table in tables for pair in table.items() if pair[0].endswith("*"))
    return next((value for start, value in starts if name.startswith(start[:-1])), None)
