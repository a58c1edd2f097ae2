"""Gemma 4 with towers for images and sound, of which the text decoder is trained."""

from dataclasses import replace
from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import gemma4_text, standard

PARTS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
LAYOUTS = (("language_model.", "lm_head"),)  # files of the model without lm_head


def read(config: Any) -> Architecture:
    standard.check_text(config, "gemma4_text")
    arch = standard.inside(config, gemma4_text.read(config.text_config), PARTS, layouts=LAYOUTS)
    # The decoder reads placeholders of other media as padding.
    media = (config.image_token_id, config.video_token_id, config.audio_token_id)
    padding = config.text_config.pad_token_id
    return replace(arch, aliases=tuple((token, padding) for token in media if token is not None))
