"""Gemma 3 with a vision tower, of which the text decoder is trained."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import gemma3_text, standard

PARTS = ("vision_tower", "multi_modal_projector")
# Files of earlier versions of transformers, which later ones write as well; and those of the model without lm_head.
LAYOUTS = (("language_model.model.", "language_model.lm_head"), ("language_model.", "lm_head"))


def read(config: Any) -> Architecture:
    standard.check_text(config, "gemma3_text")
    return standard.inside(config, gemma3_text.read(config.text_config), PARTS, layouts=LAYOUTS)
