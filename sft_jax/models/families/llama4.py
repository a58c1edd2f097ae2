"""Llama 4 with a vision tower, of which the text decoder is trained."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import llama4_text, standard

PARTS = ("vision_model", "multi_modal_projector")
PREFIX, LM_HEAD = "language_model.model.", "language_model.lm_head"


def read(config: Any) -> Architecture:
    standard.check_text(config, "llama4_text")
    return standard.inside(config, llama4_text.read(config.text_config), PARTS, PREFIX, LM_HEAD)
