"""Qwen3.5 with a vision tower, of which the text decoder is trained."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import qwen3_5_text, standard

LAYOUTS = (("language_model.", "lm_head"),)  # files of the model without lm_head


def read(config: Any) -> Architecture:
    # Rotary positions of text are the same in all three dimensions of an image or video, so they are plain positions.
    standard.check_text(config, "qwen3_5_text")
    return standard.inside(config, qwen3_5_text.read(config.text_config), ("visual",), layouts=LAYOUTS)
