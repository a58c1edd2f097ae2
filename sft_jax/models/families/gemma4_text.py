"""Gemma 4: inputs per layer, keys and values shared by the last layers, two sizes of heads."""

from dataclasses import replace
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Branch, Layer, Norm, PerLayer, Sublayer
from sft_jax.models.attention.module import SelfAttentionSpec
from sft_jax.models.families import standard
from sft_jax.models.moe.beside_mlp import BesideMLPSpec
from sft_jax.models.moe.experts import ExpertsSpec
from sft_jax.models.moe.router import RouterSpec
from sft_jax.models.per_layer import PerLayerSpec

_PREFIX = "model."
_NOT_READ = ("k_proj", "v_proj", "k_norm", "v_norm")  # of layers that share keys; published files have them


def read(config: Any) -> Architecture:
    _check(config)
    norm, size = Norm(config.rms_norm_eps, rounded_once=True), config.hidden_size_per_layer_input
    num_layers, kinds = config.num_hidden_layers, config.layer_types
    num_own = num_layers - config.num_kv_shared_layers
    mlp = standard.mlp(config)
    wide = replace(mlp, intermediate_size=2 * mlp.intermediate_size) if config.use_double_wide_mlp else mlp
    layers = []
    for i, kind in enumerate(kinds):
        reads = kind if i >= num_own else None
        publishes = kind if reads is None and kind in kinds[num_own:] else None
        attention = Branch(
            "self_attn",
            _attention(config, i, norm, reads),
            "input_layernorm",
            "post_attention_layernorm",
            publishes=publishes,
        )
        feed_forward = Branch(
            "mlp", mlp if reads is None else wide, "pre_feedforward_layernorm", "post_feedforward_layernorm"
        )
        branches = [attention, feed_forward]
        if size:
            spec = PerLayerSpec(size, mlp.activation)
            branches.append(Branch("_per_layer", spec, after="post_per_layer_input_norm"))
        sublayers = [Sublayer((branch,)) for branch in branches]
        if config.enable_moe_block:
            sublayers[1] = _with_experts(config, feed_forward, norm)
        layers.append(Layer(tuple(sublayers), norm, scalar="layer_scalar"))
    return standard.architecture(
        config,
        tuple(layers),
        norm,
        embedding_scale=config.hidden_size**0.5,
        per_layer=PerLayer(config.vocab_size_per_layer_input, size) if size else None,
        logits_softcap=config.final_logit_softcapping,
        prefix=_PREFIX,
        tensors=standard.experts_together(None),
        outside=tuple(
            f"{_PREFIX}layers.{i}.self_attn.{name}." for i in range(num_own, num_layers) for name in _NOT_READ
        ),
    )


def _attention(config: Any, layer: int, norm: Norm, reads: str | None) -> SelfAttentionSpec:
    """Returns the spec of a layer; ``reads`` is the kind of layer whose keys and values it shares."""
    kind, sizes = config.layer_types[layer], config.per_layer_config[layer]
    is_local, bias = kind == "sliding_attention", bool(config.attention_bias)
    num_heads, num_kv_heads, head_dim = config.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
    if num_heads % num_kv_heads:
        raise UserError(f"num_key_value_heads {num_kv_heads} of layer {layer} does not divide {num_heads} heads")
    rope = standard.rope(config.rope_parameters[kind], config.max_position_embeddings, head_dim)
    return SelfAttentionSpec(
        num_heads,
        num_kv_heads,
        head_dim,
        scale=1.0,
        window=config.sliding_window if is_local else None,
        rope=replace(rope, dims=rope.dims or head_dim),  # ropes of heads of different sizes are different
        qk_norm=norm,
        v_norm=replace(norm, has_weight=False) if reads is None else None,
        reads=reads,
        value_is_key=config.attention_k_eq_v and not is_local and reads is None,
        qkv_bias=bias,
        o_bias=bias,
    )


def _with_experts(config: Any, mlp: Branch, norm: Norm) -> Sublayer:
    """Returns the sum of the MLP and a mixture of experts, each with norms of its own, and a norm after the sum."""
    experts = BesideMLPSpec(
        RouterSpec(config.num_experts, config.top_k_experts),
        ExpertsSpec(config.moe_intermediate_size, standard.activation(config)),
        norm,
        "pre_feedforward_layernorm_2",
    )
    mixture = Branch("_experts", experts, after="post_feedforward_layernorm_2")
    return Sublayer((replace(mlp, after="post_feedforward_layernorm_1"), mixture), after=mlp.after)


def _check(config: Any) -> None:
    if config.use_bidirectional_attention == "all":
        raise UserError("use_bidirectional_attention 'all' is not supported: text would not be causal")
    num_own = config.num_hidden_layers - config.num_kv_shared_layers
    without = set(config.layer_types) - set(config.layer_types[: max(num_own, 0)])
    if without:
        raise UserError(
            f"num_kv_shared_layers {config.num_kv_shared_layers} leaves no layer with keys of its own for "
            f"{', '.join(sorted(without))}"
        )
