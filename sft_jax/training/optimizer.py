"""The optimizer: one transform a label, joined by ``optax.multi_transform``, and the schedule."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sft_jax.config import OptimizerConfig
from sft_jax.errors import UserError
from sft_jax.models.split import FROZEN, LABELS
from sft_jax.training.moments import scale_by_factored_adam, scale_by_rounded_adam
from sft_jax.tree import Params, Path, flatten, unflatten
from sft_jax.typing import Array

# optax raises floats to integer powers, which strict dtype promotion forbids; our own arithmetic stays strict.
_OPTAX_PROMOTION = partial(jax.numpy_dtype_promotion, "standard")

_MOMENTS = 2  # what the rounding of moments draws its numbers by; 1 is dropout, 3 the rounding of weights

DECAY_SHARE = 0.2  # of all steps, for the last phase of wsd


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[Array], Array]:
    """Learning rate by step: a linear warm-up from 0 over ``warmup_ratio`` of all steps, then the named shape.

    ``constant`` stays, ``linear`` and ``cosine`` (Loshchilov & Hutter 2017) end at 0, ``wsd`` stays and falls
    linearly to 0 over the last fifth (Hu et al. 2024). The first step after the warm-up has the full rate.
    """
    peak = config.learning_rate
    warmup = round(config.warmup_ratio * total_steps)
    rest = max(1, total_steps - warmup)
    decay = max(1, round(DECAY_SHARE * total_steps))
    shapes = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "wsd": optax.linear_schedule(peak, 0.0, decay, transition_begin=max(0, rest - decay)),
    }
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, peak, max(1, warmup)), shapes[config.schedule]], [warmup]
    )

    def rate(step: Array) -> Array:
        with _OPTAX_PROMOTION():
            return jnp.asarray(schedule(step), jnp.float32)

    return rate


def check_rates(config: OptimizerConfig, total_steps: int) -> None:
    """Refuse a schedule that never leaves zero.

    Raises:
        UserError: it does not, though the rate is none.
    """
    if config.learning_rate == 0 or total_steps == 0:
        return
    rates = make_schedule(config, total_steps)(jnp.arange(total_steps))
    if not np.asarray(rates).any():
        raise UserError(
            f"optimizer.warmup_ratio: {config.warmup_ratio:g} of {total_steps:,} steps warm up from a rate of 0, and "
            "none is left to train with it; lower it, or train longer"
        )


def make_optimizer(
    config: OptimizerConfig, labels: dict[Path, str], seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """AdamW with decoupled weight decay as in torch, by label; ``update`` takes the rate as ``learning_rate=``.

    It computes in float32 and gives float32 updates, whatever the dtype of weights and gradients. Clipping by
    the global norm sees all trainable gradients together and no others. Leaves labelled ``frozen`` are not among them;
    should one be passed all the same, its update is zero and it has no state.

    Args:
        labels: the label of every leaf that ``init`` and ``update`` are called with.
        seed: of the rounding of moments that are not float32.
    """
    unknown = {path: label for path, label in labels.items() if label not in LABELS}
    assert not unknown, unknown
    of_matrices, of_vectors = _moments(config, seed)
    decayed = optax.chain(of_matrices, optax.add_decayed_weights(config.weight_decay), _scale_by_given_rate())
    plain = optax.chain(of_vectors, _scale_by_given_rate())
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "lora_a": decayed,
        "lora_b": decayed,
        "full": decayed,
        "full_no_decay": plain,
        "adapter_vector": plain,
        FROZEN: optax.set_to_zero(),
    }
    by_label = optax.multi_transform(transforms, unflatten(dict(labels)))
    if config.max_grad_norm is not None:
        trainable = unflatten({path: label != FROZEN for path, label in labels.items()})
        by_label = optax.chain(optax.masked(optax.clip_by_global_norm(config.max_grad_norm), trainable), by_label)

    def init(params):
        return by_label.init(_in_float32(params))

    def update(updates, state, params=None, **extra):
        with _OPTAX_PROMOTION():
            return by_label.update(_in_float32(updates), state, _in_float32(params), **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _moments(config: OptimizerConfig, seed: int) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam as ``config.moments`` keeps it, for matrices and for vectors (norms and biases), which are not factored."""
    settings = (config.b1, config.b2, config.eps)
    if config.moments == "float32":
        exact = optax.scale_by_adam(*settings)
        return exact, exact
    key = jax.random.fold_in(jax.random.key(seed), _MOMENTS)
    rounded = scale_by_rounded_adam(*settings, key)
    return (rounded if config.moments == "bfloat16" else scale_by_factored_adam(*settings, key)), rounded


def _in_float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def labels_of(params: Params, labels: dict[Path, str]) -> dict[Path, str]:
    """The labels of the leaves of ``params``."""
    return {path: labels[path] for path in flatten(params)}


def _scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply by ``-learning_rate``, given at each update: the schedule follows the run's step and nothing else."""

    def update(updates, state, params=None, *, learning_rate, **_):
        return optax.tree.scale(-learning_rate, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]
