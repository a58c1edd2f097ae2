"""Reads the parts of a config that most families share: attention, MLP, rotary embedding, sliding windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Branch, Layer, Norm, Rope, Sublayer
from sft_jax.models.attention.module import SelfAttentionSpec
from sft_jax.models.mlp import ACTIVATIONS, MLPSpec
from sft_jax.models.moe.experts import ExpertsSpec
from sft_jax.models.moe.mixture import MixtureSpec
from sft_jax.models.moe.router import RouterSpec
from sft_jax.models.recurrent.gated_delta import GatedDeltaSpec


@dataclass(frozen=True)
class Order:
    """The order of a layer with one mixer and one MLP, and the names of its modules; None for no norm.

    Attributes:
        parallel: whether the MLP reads what the mixer reads, and both outputs are added at once.
        scale: multiplies both outputs.
    """

    before_mixer: str | None = "input_layernorm"
    after_mixer: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    scale: float = 1.0
    mixer: str = "self_attn"
    mlp: str = "mlp"

    def layer(self, mixer: Any, mlp: Any, norm: Norm) -> Layer:
        """Returns the layer of two specs."""
        first = Branch(self.mixer, mixer, self.before_mixer, self.after_mixer)
        second = Branch(self.mlp, mlp, self.before_mlp, self.after_mlp)
        groups = [(first, second)] if self.parallel else [(first,), (second,)]
        return Layer(tuple(Sublayer(group, scale=self.scale) for group in groups), norm)


PRE_NORM = Order()


def decoder(
    config: Any,
    attention: Any,
    mlp: Any,
    norm: Norm | None = None,
    order: Order = PRE_NORM,
    rope_of: Callable[[int, int | None], Rope | None] | None = None,
    **more: Any,
) -> Architecture:
    """Returns a decoder of equal layers, except for the sliding windows in ``layer_types``.

    Args:
        attention: the spec of all layers, except for their windows.
        mlp: the spec of all layers, or a list with one for each.
        norm: the norm of the layers and the final norm; by default an RMS norm with ``rms_norm_eps``.
        order: where the norms are, and how mixer and MLP are added.
        rope_of: from the index of a layer and its window to its rotary embedding, where layers differ in it.
        more: fields of :class:`Architecture`.
    """
    norm = norm or Norm(config.rms_norm_eps)
    windows = sliding_windows(config)
    mlps = mlp if isinstance(mlp, list) else [mlp] * len(windows)
    layers = []
    for i, (window, one) in enumerate(zip(windows, mlps, strict=True)):
        mixer = replace(attention, window=window)
        if rope_of is not None:
            mixer = replace(mixer, rope=rope_of(i, window))
        layers.append(order.layer(mixer, one, norm))
    return architecture(config, tuple(layers), norm, **more)


def architecture(config: Any, layers: tuple[Layer, ...], norm: Norm, **more: Any) -> Architecture:
    """Returns an architecture with the sizes that every config has."""
    return Architecture(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=layers,
        norm=norm,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
        initializer_range=getattr(config, "initializer_range", 0.02),
        **more,
    )


def inside(
    config: Any,
    text: Architecture,
    parts: tuple[str, ...],
    prefix: str = "model.language_model.",
    lm_head: str = "lm_head",
    layouts: tuple[tuple[str, str], ...] = (),
) -> Architecture:
    """Returns the decoder of a multimodal model, the other parts of which are not trained.

    Args:
        config: of the whole model.
        text: the decoder as ``config.text_config`` describes it.
        parts: names of the other parts, such as ``vision_tower``. Files have them with ``model.`` in front or without.
        prefix, lm_head: names in transformers' modules, and in files unless these have one of the ``layouts``.
        layouts: see :class:`Architecture`.
    """
    starts = tuple(f"{start}{part}." for part in parts for start in ("model.", ""))
    return replace(
        text,
        family=config.model_type,
        # Configs have it in either place; files with another lm_head are recognized when they are opened.
        tie_word_embeddings=bool(config.tie_word_embeddings) or text.tie_word_embeddings,
        prefix=prefix,
        module_prefix=prefix,
        tensors=(*text.tensors, ("lm_head", lm_head)),
        layouts=layouts,
        outside=(*starts, *text.outside),
        is_part=True,
    )


def check_text(config: Any, *names: str) -> None:
    """Checks the ``model_type`` of the decoder in a multimodal model.

    Raises:
        UserError: it is not one of ``names``.
    """
    found = config.text_config.model_type
    if found not in names:
        raise UserError(
            f"text_config.model_type {found!r} is not supported in {config.model_type}; supported: {', '.join(names)}"
        )


def attention(config: Any, interleaved: bool = False, **more: Any) -> SelfAttentionSpec:
    """Returns the attention spec; ``interleaved`` is that of the rope, ``more`` are fields of the spec.

    Raises:
        UserError: the key/value heads do not divide the heads, or the rotary embedding is not supported.
    """
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_kv_heads:
        raise UserError(f"num_key_value_heads {num_kv_heads} does not divide {num_heads} heads")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if "rope" not in more:
        more["rope"] = rope(config.rope_parameters, config.max_position_embeddings, head_dim, interleaved)
    return SelfAttentionSpec(num_heads, num_kv_heads, head_dim, **more)


def gated_delta(config: Any, projections: tuple[tuple[str, str], ...], **more: Any) -> GatedDeltaSpec:
    """Returns the spec of the gated delta rule; arguments are fields of :class:`GatedDeltaSpec`.

    Raises:
        UserError: the key heads do not divide the value heads, or the activation is not supported.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if values % keys:
        raise UserError(f"linear_num_key_heads {keys} does not divide {values} linear_num_value_heads")
    return GatedDeltaSpec(
        keys,
        values,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        projections,
        activation=activation(config),
        **more,
    )


def mlp(config: Any, bias: bool = False, **more: Any) -> MLPSpec:
    """Returns the spec of the MLP; ``more`` are fields of :class:`MLPSpec`.

    Raises:
        UserError: the activation is not supported.
    """
    size = more.pop("intermediate_size", None) or config.intermediate_size
    return MLPSpec(size, activation(config, more=("xielu",)), bias, **more)


def mixture(config: Any, router: RouterSpec, size: int, **more: Any) -> MixtureSpec:
    """Returns the spec of a mixture of gated experts.

    Args:
        size: of each expert.
        more: fields of :class:`MixtureSpec`.
    """
    return MixtureSpec(router, ExpertsSpec(size, activation(config)), **more)


def expert_tensors(
    branch: str = "mlp", stored: str | None = None, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[tuple[str, str | tuple[str, ...]], ...]:
    """Returns the names of experts that are stored one by one, for ``Architecture.tensors``.

    Args:
        branch: the name of the mixture in the layer.
        stored: its name in the files, where it differs.
        names: of the linear layers of an expert.
    """
    gate, up, down = (f"{stored or branch}.experts.{{expert}}.{name}.weight" for name in names)
    pairs = ((f"{branch}.experts.gate_up_proj.weight", (gate, up)), (f"{branch}.experts.down_proj.weight", down))
    return pairs if stored is None else (*pairs, (branch, stored))


def experts_together(branch: str | None = "mlp") -> tuple[tuple[str, str], ...]:
    """Returns the names of experts that are stored in one tensor, for ``Architecture.tensors``.

    Args:
        branch: the name of the mixture in the layer; None for experts of the layer itself.
    """
    start = "" if branch is None else f"{branch}."
    names = (f"{start}experts.gate_up_proj", f"{start}experts.down_proj")
    return tuple((f"{name}.weight", name) for name in names)


def activation(config: Any, *keys: str, more: tuple[str, ...] = ()) -> str:
    """Returns the name of an activation, by default that of the MLP.

    Args:
        keys: of the config; the first one that has a value counts.
        more: names that are supported besides :data:`~sft_jax.models.mlp.ACTIVATIONS`.

    Raises:
        UserError: it is not supported.
    """
    keys = keys or ("hidden_act", "hidden_activation", "activation_function")
    key = next((one for one in keys if getattr(config, one, None) is not None), None)
    name, supported = "silu" if key is None else getattr(config, key), (*ACTIVATIONS, *more)
    if name not in supported:
        raise UserError(f"{key} {name!r} is not supported; supported are {', '.join(supported)}")
    return name


def sliding_windows(config: Any) -> list[int | None]:
    """Returns the sliding window of each layer; None for full attention."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return [None] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rope(parameters: Mapping[str, Any], max_positions: int, head_dim: int, interleaved: bool = False) -> Rope:
    """Returns the rotary embedding of ``rope_parameters``.

    Args:
        head_dim: of which ``partial_rotary_factor`` is a fraction.
        interleaved: see :class:`Rope`.

    Raises:
        UserError: the ``rope_type`` is not supported, or the factors of ``longrope`` are not one per pair of channels.
    """
    partial = _number(parameters, "partial_rotary_factor", 1.0)
    if parameters.get("rope_type") == "proportional":
        factor = _number(parameters, "factor", 1.0)
        return Rope(_number(parameters, "rope_theta"), "proportional", factor, share=partial)
    dims = None if partial == 1.0 else int(head_dim * partial)
    if (rotated := head_dim if dims is None else dims) % 2 or rotated > head_dim:
        raise UserError(f"head_dim {head_dim}: {rotated} of its channels are rotated, which are not pairs of them")
    scaled = replace(_scaled_rope(parameters, max_positions), dims=dims, interleaved=interleaved)
    for key, factors in (("short_factor", scaled.factors), ("long_factor", scaled.long_factors)):
        if factors and len(factors) != rotated // 2:
            raise UserError(f"{key} has {len(factors)} values, but {rotated} channels are rotated in pairs")
    return scaled


def _scaled_rope(parameters: Mapping[str, Any], max_positions: int) -> Rope:
    kind = parameters.get("rope_type", "default")
    theta = _number(parameters, "rope_theta")
    if kind in ("default", "dynamic"):  # dynamic equals default within the context, and no sequence is longer
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=_number(parameters, "factor"))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            factor=_number(parameters, "factor"),
            low_freq_factor=_number(parameters, "low_freq_factor"),
            high_freq_factor=_number(parameters, "high_freq_factor"),
            original_max_position_embeddings=int(_number(parameters, "original_max_position_embeddings")),
        )
    if kind == "yarn":
        factor = _number(parameters, "factor")
        return Rope(
            theta,
            kind,
            factor=factor,
            original_max_position_embeddings=int(
                _number(parameters, "original_max_position_embeddings", max_positions)
            ),
            beta_fast=_number(parameters, "beta_fast", 32.0),
            beta_slow=_number(parameters, "beta_slow", 1.0),
            truncate=bool(parameters.get("truncate", True)),
            attention_factor=_attention_factor(parameters, factor),
        )
    if kind == "longrope":
        original = int(_number(parameters, "original_max_position_embeddings"))
        factor = _number(parameters, "factor", max_positions / original)
        usual = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
        scale = _number(parameters, "attention_factor", usual)
        return Rope(
            theta,
            kind,
            original_max_position_embeddings=original,
            attention_factor=scale,
            factors=_numbers(parameters, "short_factor"),
            long_factors=_numbers(parameters, "long_factor"),
        )
    raise UserError(
        f"rope_type {kind!r} is not supported; supported are default, linear, llama3, yarn, longrope, proportional, "
        "dynamic"
    )


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Returns a positive number; the default where it is missing or zero."""
    value = parameters.get(key) or default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:
        raise UserError(f"rope_parameters.{key} {str(value)[:40]} is not a positive number")
    return float(value)


def _numbers(parameters: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = parameters.get(key)
    if not isinstance(values, list):
        raise UserError(f"rope_parameters.{key} is not a list of numbers")
    return tuple(_number({key: value}, key) for value in values)


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """Returns the scale of queries and keys in YaRN, by default ``0.1 · ln(factor) + 1``."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    mscale_all_dim, mscale = parameters.get("mscale_all_dim"), parameters.get("mscale")
    if mscale and mscale_all_dim:
        return yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim)
    return yarn_scale(factor)


def yarn_scale(factor: float, by: float = 1.0) -> float:
    """Returns ``0.1 · by · ln(factor) + 1``, by which YaRN scales attention in a longer context."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0
