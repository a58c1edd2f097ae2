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
from sft_jax.training.cross_entropy import PLAIN, Terms
from sft_jax.training.loss import LossSums, batch_loss, no_sums
from sft_jax.training.rounding import apply_updates
from sft_jax.training.state import TrainState
from sft_jax.tree import Params
from sft_jax.typing import Array, Batch

Metrics = dict[str, Array]
Sums = tuple[Array, LossSums, Params]  # loss, what goes with it, gradients
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Params, Batch], Metrics]


def make_train_step(
    split: Split,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    accumulation: int = 1,
    dropout_key: Array | None = None,
    out_shardings: Any = None,
    num_sources: int = 0,
    terms: Terms = PLAIN,
    rounding_key: Array | None = None,
) -> TrainStep:
    """``step(state, frozen, batch) -> (state, metrics)``, jitted; the given state's buffers are reused.

    Only trainable leaves are differentiated. The batch is computed in ``accumulation`` parts of equal row counts;
    loss sums, target weights and gradients are added up in float32 and divided once by the weight of all targets. The
    gradient of one part has the dtype of its weight: where that is bfloat16, it was added up over positions and devices
    in float32 and then rounded once, to the nearest. (Those of norms a TPU's compiler rounds before devices add them.)

    A batch without targets has loss 0 and changes nothing but the step counter. A loss or gradient that is not finite
    halts the state: from then on no step changes it, so what is saved is the state before the fault.

    Args:
        dropout_key: turns adapter dropout on; each step and part has its own key.
        out_shardings: of the new state; gradients are constrained to those of the weights.
        num_sources: how many sources ``batch.sources`` tells apart.
        terms: what the loss has besides the negative log-likelihood.
        rounding_key: for weights that are kept in bfloat16; each step has its own key.

    Returns:
        A function whose metrics are ``loss, grad_norm, learning_rate, token_accuracy, entropy, target_tokens,
        real_tokens, finite`` and ``by_source``, summed loss and weight of each source. Accuracy and entropy are means
        over target tokens.
    """

    def loss_of(trainable: Params, frozen: Params, batch: Batch, key: Array | None) -> tuple[Array, LossSums]:
        return batch_loss(split.merge(trainable, frozen), batch, key, num_sources, terms)

    def placed(grads: Params) -> Params:
        if out_shardings is not None:
            grads = lax.with_sharding_constraint(grads, out_shardings.params)
        # Table and head laid out as their weights and moments are: else the compiler takes the layout that a product
        # happens to leave, and copies the head's weight and moments into it before the first layer: 9,332 instead of
        # 8,956 MiB a chip for Llama-3-8B in float32 on 16 TPU v5e. Stacked leaves lie as the loop over them wants.
        return jax.tree.map(lambda g: with_layout_constraint(g, Layout((0, 1))) if g.ndim == 2 else g, grads)

    def part(params: Params, frozen: Params, batch: Batch, key: Array | None) -> Sums:
        (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(params, frozen, batch, key)
        return loss, sums, placed(grads)

    def total(params: Params, frozen: Params, batch: Batch, key: Array | None) -> Sums:
        if accumulation == 1:
            return part(params, frozen, batch, key)
        keys = None if key is None else jax.random.split(key, accumulation)
        zero_grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        zero = (jnp.zeros(()), no_sums(num_sources), placed(zero_grads))

        def add(so_far: Sums, scanned: tuple[Batch, Array | None]) -> tuple[Sums, None]:
            found = part(params, frozen, *scanned)
            return jax.tree.map(lambda total, one: total + one.astype(jnp.float32), so_far, found), None

        return lax.scan(add, zero, (_interleave(batch, accumulation), keys))[0]

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, state.step)
        loss_sum, sums, grad_sums = total(state.params, frozen, batch, key)
        weight = sums.weight
        denominator = jnp.where(weight > 0, weight, 1.0)
        loss = loss_sum / denominator
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / denominator, grad_sums)
        grad_norm = optax.tree.norm(grads)
        learning_rate = schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate=learning_rate)
        now = None if rounding_key is None else jax.random.fold_in(rounding_key, state.step)
        params = apply_updates(state.params, updates, now)  # type: ignore[arg-type]

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        halted = state.halted | ~finite
        applies = ~halted & (weight > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applies, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        step = state.step + jnp.where(halted, 0, 1).astype(jnp.int32)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "token_accuracy": sums.correct / jnp.maximum(sums.targets, 1.0),
            "entropy": sums.entropy / jnp.maximum(sums.targets, 1.0),
            "target_tokens": sums.targets,
            "real_tokens": jnp.sum(batch.segment_ids > 0, dtype=jnp.float32),
            "finite": finite,
            "by_source": sums.by_source,
        }
        return TrainState(step=step, params=params, opt_state=opt_state, halted=halted), metrics

    shardings = None if out_shardings is None else (out_shardings, None)
    options = compiler_options(split)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def make_eval_step(split: Split, num_sources: int = 0) -> EvalStep:
    """``step(trainable, frozen, batch)`` with the sums of the loss, without dropout.

    They are ``loss``, ``weight``, ``targets``, ``correct``, ``entropy`` and ``by_source``.
    """

    def eval_step(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        loss, sums = batch_loss(split.merge(trainable, frozen), batch, None, num_sources)
        return {"loss": loss} | vars(sums)

    return jax.jit(eval_step, compiler_options=compiler_options(split, gradients=False))


def _interleave(batch: Batch, parts: int) -> Batch:
    """``[B, T]`` to ``[parts, B / parts, T]`` such that every device keeps the rows it has."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, -1), 0, 1), batch)
