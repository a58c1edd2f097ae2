"""GPT-NeoX and Pythia: a fused projection by head, attention and MLP in parallel with their own norms."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard

TENSORS = (("embed_tokens", "embed_in"), ("norm", "final_layer_norm"), ("lm_head", "lm_head"))
LAYOUTS = (("gpt_neox.", "embed_out"),)  # of files; transformers 5 names the module lm_head


def read(config: Any) -> Architecture:
    bias = bool(config.attention_bias)
    attention = standard.attention(
        config, fused="query_key_value", fused_by_head=True, qkv_bias=bias, o_bias=bias, o_name="dense"
    )
    mlp = standard.mlp(config, bias=True, gated=False, names=("dense_h_to_4h", "dense_4h_to_h"))
    norm = Norm(config.layer_norm_eps, centered=True, has_bias=True)
    order = standard.Order(parallel=bool(config.use_parallel_residual), mixer="attention")
    return standard.decoder(config, attention, mlp, norm, order, prefix="gpt_neox.", tensors=TENSORS, layouts=LAYOUTS)
