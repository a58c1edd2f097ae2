"""DeepSeek-V3 and R1: latent attention, whose scale grows with the context that YaRN extends, and experts in groups."""

from dataclasses import replace
from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.attention.latent import LatentAttentionSpec
from sft_jax.models.families import glm4_moe, standard

_LATENT_NORM = Norm(1e-6)  # whatever rms_norm_eps is


def read(config: Any) -> Architecture:
    return glm4_moe.decoder(config, attention(config))


def attention(config: Any) -> LatentAttentionSpec:
    """Returns the spec of latent attention, also for DeepSeek-V2.

    Raises:
        UserError: the rotary embedding is not supported.
    """
    rotated, interleaved = config.qk_rope_head_dim, bool(getattr(config, "rope_interleave", True))
    rope = standard.rope(config.rope_parameters, config.max_position_embeddings, rotated, interleaved)
    head_dim = config.qk_nope_head_dim + rotated
    return LatentAttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        v_head_dim=config.v_head_dim,
        scale=head_dim**-0.5 * _yarn_scale(config.rope_parameters) ** 2,
        rope=replace(rope, dims=rotated),
        kv_rank=config.kv_lora_rank,
        q_rank=config.q_lora_rank,
        norm=_LATENT_NORM,
        bias=bool(config.attention_bias),
    )


def _yarn_scale(parameters: Any) -> float:
    """Returns the factor of queries and keys; other models apply it to the rotated channels only, through the rope."""
    by, kind = parameters.get("mscale_all_dim"), parameters.get("rope_type", "default")
    return 1.0 if kind == "default" or not by else standard.yarn_scale(parameters["factor"], by)
