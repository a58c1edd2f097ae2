"""One optimisation step and one evaluation step, each a single jitted function of plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from sft_jax.models.compiler import compiler_options
from sft_jax.models.split import Split
from sft_jax.training.losses import Loss, Sums, cross_entropy_loss
from sft_jax.training.rounding import apply_updates
from sft_jax.training.state import TrainState
from sft_jax.tree import Params
from sft_jax.typing import Array, Batch

Metrics = dict[str, Array]
Found = tuple[Sums, Params]  # sums of a loss, and gradients
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Params, Batch], Sums]


def make_train_step(
    split: Split,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    num_microbatches: int = 1,
    dropout_key: Array | None = None,
    out_shardings: Any = None,
    loss: Loss | None = None,
    rounding_key: Array | None = None,
) -> TrainStep:
    """``step(state, frozen, batch) -> (state, metrics)``, jitted; the given state's buffers are reused.

    Only trainable leaves are differentiated. The batch is computed in ``num_microbatches`` of as many sequences each;
    the loss's sums and gradients are added up in float32 and divided once by the weight of the global batch. The
    gradient of a microbatch has the dtype of its weight: where that is bfloat16, it was added up over positions and
    devices in float32 and then rounded once. (Those of norms a TPU's compiler rounds before devices add them.)

    A batch without targets has loss 0 and changes nothing but the step counter. A loss or gradient that is not finite
    halts the state: from then on no step changes it, so what is saved is the state before the fault.

    Args:
        dropout_key: turns adapter dropout on; each step and microbatch has its own key.
        out_shardings: of the new state; gradients are constrained to those of the weights.
        loss: what is minimised; by default the cross-entropy of supervised tokens.
        rounding_key: for weights that are kept in bfloat16; each step has its own key.

    Returns:
        A function whose metrics are those of the loss, ``grad_norm, learning_rate, target_tokens, real_tokens, finite``
        and ``source_weight``, the weight of each source.
    """
    loss = loss or cross_entropy_loss()

    def loss_of(trainable: Params, frozen: Params, batch: Batch, key: Array | None) -> tuple[Array, Sums]:
        sums = loss.sums(split.merge(trainable, frozen), batch, key)
        return sums["loss"], sums

    def placed(grads: Params) -> Params:
        if out_shardings is not None:
            grads = lax.with_sharding_constraint(grads, out_shardings.params)
        # Table and head laid out as their weights and moments are: else the compiler takes the layout that a product
        # happens to leave, and copies the head's weight and moments into it before the first layer: 9,332 instead of
        # 8,956 MiB a chip for Llama-3-8B in float32 on 16 TPU v5e. Stacked leaves lie as the loop over them wants.
        return jax.tree.map(lambda g: with_layout_constraint(g, Layout((0, 1))) if g.ndim == 2 else g, grads)

    def microbatch(params: Params, frozen: Params, batch: Batch, key: Array | None) -> Found:
        (_, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(params, frozen, batch, key)
        return sums, placed(grads)

    def total(params: Params, frozen: Params, batch: Batch, key: Array | None) -> Found:
        if num_microbatches == 1:
            return microbatch(params, frozen, batch, key)
        keys = None if key is None else jax.random.split(key, num_microbatches)
        zero_grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        zero = ({name: jnp.asarray(one) for name, one in loss.zeros.items()}, placed(zero_grads))

        def add(so_far: Found, scanned: tuple[Batch, Array | None]) -> tuple[Found, None]:
            found = microbatch(params, frozen, *scanned)
            return jax.tree.map(lambda total, one: total + one.astype(jnp.float32), so_far, found), None

        return lax.scan(add, zero, (_interleave(batch, num_microbatches), keys))[0]

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, state.step)
        sums, grad_sums = total(state.params, frozen, batch, key)
        weight, told = sums["weight"], loss.metrics(sums)
        denominator = jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / denominator, grad_sums)
        grad_norm = optax.tree.norm(grads)
        learning_rate = schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate=learning_rate)
        now = None if rounding_key is None else jax.random.fold_in(rounding_key, state.step)
        params = apply_updates(state.params, updates, now)  # type: ignore[arg-type]

        finite = jnp.isfinite(told["loss"]) & jnp.isfinite(grad_norm)
        halted = state.halted | ~finite
        applies = ~halted & (weight > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applies, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        step = state.step + jnp.where(halted, 0, 1).astype(jnp.int32)
        metrics = told | {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "target_tokens": sums["targets"],
            "real_tokens": jnp.sum(batch.segment_ids > 0, dtype=jnp.float32),
            "finite": finite,
            "source_weight": sums["source_weight"],
        }
        return TrainState(step=step, params=params, opt_state=opt_state, halted=halted), metrics

    shardings = None if out_shardings is None else (out_shardings, None)
    options = compiler_options(split)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def make_eval_step(split: Split, loss: Loss) -> EvalStep:
    """``step(trainable, frozen, batch)`` with the sums of a loss, without dropout."""

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        return loss.sums(split.merge(trainable, frozen), batch, None)

    return jax.jit(eval_step, compiler_options=compiler_options(split, gradients=False))


def _interleave(batch: Batch, parts: int) -> Batch:
    """``[B, T]`` to ``[parts, B / parts, T]`` such that every device keeps the rows it has."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, -1), 0, 1), batch)
