"""Qwen3-Next: the layers of Qwen3.5 with experts and a shared expert; projections have all parts of a head together."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import qwen2_moe, qwen3_5_text, standard

PROJECTIONS = (("in_proj_qkvz", "qkvz"), ("in_proj_ba", "ba"))


def read(config: Any) -> Architecture:
    return qwen3_5_text.decoder(
        config, qwen2_moe.mlps(config), PROJECTIONS, grouped=True, tensors=standard.expert_tensors()
    )
