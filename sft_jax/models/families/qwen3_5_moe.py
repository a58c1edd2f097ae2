"""Qwen3.5 MoE with a vision tower, of which the text decoder is trained."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import qwen3_5_moe_text, standard
from sft_jax.models.families.qwen3_5 import LAYOUTS
from sft_jax.models.families.qwen3_5_moe_text import as_in_files

__all__ = ["as_in_files", "read"]


def read(config: Any) -> Architecture:
    standard.check_text(config, "qwen3_5_moe_text")
    return standard.inside(config, qwen3_5_moe_text.read(config.text_config), ("visual",), layouts=LAYOUTS)
