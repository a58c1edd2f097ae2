"""dots.llm1: attention as in Qwen3, experts as in DeepSeek-V3."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import glm4_moe, standard


def read(config: Any) -> Architecture:
    bias, norm = bool(config.attention_bias), Norm(config.rms_norm_eps)
    attention = standard.attention(config, qk_norm=norm, qkv_bias=bias, o_bias=bias)
    return standard.decoder(config, attention, glm4_moe.mlps(config), tensors=standard.expert_tensors())
