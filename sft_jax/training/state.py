"""What changes from step to step, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.sharding import replicated
from sft_jax.tree import Params
from sft_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Trainable leaves and what the optimizer keeps about them. Frozen weights are not part of it."""

    step: Array  # int32: steps done
    params: Params  # trainable leaves: adapters float32, base weights as ``model.param_dtype`` says
    opt_state: Any
    halted: Array  # bool: a loss was not finite; no step changes anything any more


def make_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step; what the optimizer keeps is born where :func:`state_shardings` says."""
    shardings = state_shardings(params, optimizer, mesh)

    def start(params: Params) -> tuple[Any, Array, Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), bool)

    born = (shardings.opt_state, shardings.step, shardings.halted)
    opt_state, step, halted = jax.jit(start, out_shardings=born)(params)
    return TrainState(step=step, params=params, opt_state=opt_state, halted=halted)


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each leaf of a state lives: what the optimizer keeps of a weight is split as the weight is.

    A dimension that is averaged over (of a factored moment) has size 1 and is not split.

    Args:
        params: arrays, or abstract leaves with shardings.
    """
    param_shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if _is_masked(leaf) else _without_averaged(leaf, sharding),
        jax.eval_shape(optimizer.init, params),
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_masked,  # a leaf of another label
    )
    return TrainState(
        step=replicated(mesh),  # type: ignore[arg-type]
        params=param_shardings,
        opt_state=opt_state,
        halted=replicated(mesh),  # type: ignore[arg-type]
    )


def abstract_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, for restoring a checkpoint into."""
    shardings = state_shardings(params, optimizer, mesh)
    scalar = jax.ShapeDtypeStruct
    shapes = TrainState(
        step=scalar((), jnp.int32),  # type: ignore[arg-type]
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
        halted=scalar((), jnp.bool_),  # type: ignore[arg-type]
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _without_averaged(leaf: jax.ShapeDtypeStruct, sharding: Any) -> Any:
    if 1 not in leaf.shape:
        return sharding
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    return NamedSharding(
        sharding.mesh, PartitionSpec(*(None if n == 1 else names for n, names in zip(leaf.shape, spec, strict=True)))
    )


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
