"""GLM-4-0414: GLM-4 with norms before and after attention and MLP."""

from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import glm, standard

ORDER = standard.Order(after_mixer="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")


def read(config: Any) -> Architecture:
    return standard.decoder(config, glm.attention(config), standard.mlp(config, fused="gate_up_proj"), order=ORDER)
