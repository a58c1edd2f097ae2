"""Mistral Small 3.1 and later and Ministral 3 with a vision tower, of which the text decoder is trained."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import gemma3, ministral3, mistral, standard

_TEXTS = {"mistral": mistral, "ministral3": ministral3}


def read(config: Any) -> Architecture:
    standard.check_text(config, *_TEXTS)
    text = _TEXTS[config.text_config.model_type].read(config.text_config)
    return standard.inside(config, text, gemma3.PARTS, layouts=gemma3.LAYOUTS)
