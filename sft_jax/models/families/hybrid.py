"""Reads what families with several kinds of mixers share: layers by type, Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Layer, Norm
from sft_jax.models.families.standard import PRE_NORM, Order, activation
from sft_jax.models.recurrent.mamba2 import Mamba2Spec


def by_type(config: Any, values: Mapping[str, Any]) -> list[Any]:
    """Returns the value for the type of each layer in ``layer_types``.

    Raises:
        UserError: there is no value for a type.
    """
    for kind in config.layer_types:
        if kind not in values:
            raise UserError(f"layer_types: {kind!r} is not supported; supported are {', '.join(values)}")
    return [values[kind] for kind in config.layer_types]


def layers(
    config: Any, mixers: Mapping[str, tuple[str, Any]], mlps: list[Any], norm: Norm, order: Order = PRE_NORM
) -> tuple[Layer, ...]:
    """Returns layers of a mixer and an MLP.

    Args:
        mixers: the name and the spec of the mixer for each type in ``layer_types``.
        mlps: the MLP or mixture of experts of each layer.
        order: of which the name of the mixer is not used.

    Raises:
        UserError: there is no mixer for a type.
    """
    pairs = zip(by_type(config, mixers), mlps, strict=True)
    return tuple(replace(order, mixer=name).layer(spec, mlp, norm) for (name, spec), mlp in pairs)


def mamba2(config: Any, norm: Norm | None, **more: Any) -> Mamba2Spec:
    """Returns the Mamba-2 spec of a config with keys ``mamba_…``; ``more`` are fields of :class:`Mamba2Spec`.

    Raises:
        UserError: the groups do not divide the heads, or the activation is not supported.
    """
    num_heads, num_groups = config.mamba_n_heads, config.mamba_n_groups
    if num_heads % num_groups:
        raise UserError(f"mamba_n_groups {num_groups} does not divide {num_heads} mamba_n_heads")
    least, greatest = config.time_step_limit or (0.0, math.inf)
    return Mamba2Spec(
        num_heads,
        config.mamba_d_head,
        num_groups,
        config.mamba_d_state,
        norm,
        conv_size=config.mamba_d_conv,
        conv_bias=bool(config.mamba_conv_bias),
        in_bias=bool(config.mamba_proj_bias),
        activation=activation(config, "hidden_act"),
        time_step_limit=(float(least), float(greatest)),
        **more,
    )
