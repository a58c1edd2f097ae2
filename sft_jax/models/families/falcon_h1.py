"""Falcon-H1: Mamba-2 and attention read the same hidden states; all products have scales (muP)."""

from dataclasses import replace
from typing import Any

from sft_jax.models.architecture import Architecture, Branch, Layer, Norm, Sublayer
from sft_jax.models.families import hybrid, standard


def read(config: Any) -> Architecture:
    norm = Norm(config.rms_norm_eps)
    bias = bool(config.attention_bias)
    attention = standard.attention(config, qkv_bias=bias, o_bias=bias)
    # Keys are rotated after they are multiplied, so that the scores are multiplied instead.
    attention = replace(attention, scale=config.key_multiplier * attention.head_dim**-0.5)
    gate_scale, down_scale = config.mlp_multipliers
    mlp = standard.mlp(config, bool(config.mlp_bias), gate_scale=gate_scale)
    before = "input_layernorm"
    spec = hybrid.mamba2(
        config,
        norm if config.mamba_rms_norm else None,
        norm_before_gate=bool(config.mamba_norm_before_gate),
        out_bias=bool(config.projectors_bias),
        scales=tuple(config.ssm_multipliers),
    )
    scales = {"in_scale": config.ssm_in_multiplier, "out_scale": config.ssm_out_multiplier}
    mamba = Branch("mamba", spec, before, **scales)
    scales = {"in_scale": config.attention_in_multiplier, "out_scale": config.attention_out_multiplier}
    mixers = Sublayer((mamba, Branch("self_attn", attention, before, **scales)))
    layer = Layer((mixers, Sublayer((Branch("feed_forward", mlp, "pre_ff_layernorm", out_scale=down_scale),))), norm)
    return standard.architecture(
        config,
        (layer,) * config.num_hidden_layers,
        norm,
        embedding_scale=config.embedding_multiplier,
        logits_scale=config.lm_head_multiplier,
        tensors=(("norm", "final_layernorm"),),
    )
