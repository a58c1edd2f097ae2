"""OLMo 2: norms after mixer and MLP, and of all queries and keys together."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard

POST_NORM = standard.Order(
    before_mixer=None,
    after_mixer="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps)
    attention = standard.attention(config, qk_norm=norm, qk_norm_heads=True, qkv_bias=bias, o_bias=bias)
    return standard.decoder(config, attention, standard.mlp(config), norm, POST_NORM)
