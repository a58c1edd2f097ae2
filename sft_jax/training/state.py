"""The training state as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.cpu_compiler import cpu_options
from sft_jax.sharding import replicated
from sft_jax.tree import Params
from sft_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Trainable parameters and optimizer state. Frozen weights are not part of it."""

    step: Array  # int32: number of completed steps
    params: Params  # adapters in float32, base weights in ``model.param_dtype``
    opt_state: Any
    halted: Array  # bool: a loss was not finite; later steps change nothing


def make_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Creates the state before the first step, with the optimizer state in its final sharding."""
    shardings = state_shardings(params, optimizer, mesh)

    def start(params: Params) -> tuple[Any, Array, Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), bool)

    out_shardings = (shardings.opt_state, shardings.step, shardings.halted)
    options = cpu_options(mesh.devices.flat[0])
    opt_state, step, halted = jax.jit(start, out_shardings=out_shardings, compiler_options=options)(params)
    return TrainState(step=step, params=params, opt_state=opt_state, halted=halted)


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the shardings of a state: the optimizer state of a weight has the sharding of the weight.

    A factored moment averages over a dimension, which has size 1 then and is not sharded.

    Args:
        params: arrays, or abstract arrays with shardings.
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
    """Returns shapes, dtypes and shardings of a state, to restore a checkpoint."""
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
