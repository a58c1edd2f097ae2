"""The optimizer, one ``optax.multi_transform`` transform per label, and the learning-rate schedule."""

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
from sft_jax.training.spikes import guard_spikes
from sft_jax.tree import Params, Path, flatten, unflatten
from sft_jax.typing import Array

# optax raises floats to integer powers, which strict dtype promotion forbids. Our own arithmetic stays strict.
_OPTAX_PROMOTION = partial(jax.numpy_dtype_promotion, "standard")

_MOMENTS = 2  # fold_in constant for rounding moments; 1 is dropout, 3 is rounding weights

DECAY_SHARE = 0.2  # fraction of all steps in the decay phase of wsd


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[Array], Array]:
    """Returns the schedule: a linear warm-up from 0 over ``warmup_ratio`` of all steps, then ``config.schedule``.

    ``linear`` and ``cosine`` (Loshchilov & Hutter 2017) decay to 0. ``wsd`` (Hu et al. 2024) is constant and decays
    linearly to 0 over the last fifth of all steps. The first step after the warm-up has the peak rate.
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
    """Checks that the schedule is not zero at every step.

    Raises:
        UserError: all steps have rate 0, although ``learning_rate`` is not 0.
    """
    if config.learning_rate == 0 or total_steps != 1:
        return
    # With more steps, the second one is beyond the rate of 0 that a warm-up starts from.
    if not np.asarray(make_schedule(config, total_steps)(jnp.arange(total_steps))).any():
        raise UserError(
            f"optimizer.warmup_ratio: {config.warmup_ratio:g} of {total_steps:,} steps are warm-up from a rate of 0, "
            "and no step has a rate above 0; lower it, or train longer"
        )


def make_optimizer(
    config: OptimizerConfig, labels: dict[Path, str], seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with decoupled weight decay as in PyTorch; ``update`` takes the keyword ``learning_rate``.

    It computes float32 updates, whatever the dtype of weights and gradients. The global norm for clipping includes
    exactly the trainable gradients. A leaf with the label ``frozen`` has no state, and its update is zero.

    Args:
        labels: the label of every leaf in the arguments of ``init`` and ``update``.
        seed: seed for rounding moments that are not float32.
    """
    unknown = {path: label for path, label in labels.items() if label not in LABELS}
    assert not unknown, unknown
    matrices, vectors = _moments(config, seed)
    decayed = optax.chain(matrices, optax.add_decayed_weights(config.weight_decay), _scale_by_learning_rate())
    plain = optax.chain(vectors, _scale_by_learning_rate())
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

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    return optimizer if config.spike_guard is None else guard_spikes(optimizer, config.spike_factor)


def _moments(config: OptimizerConfig, seed: int) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Returns Adam with ``config.moments`` for matrices, and for vectors (norms and biases), which are not factored."""
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
    """Returns the labels of the leaves of ``params``."""
    return {path: labels[path] for path in flatten(params)}


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies by ``-learning_rate``, an argument of each update, so the schedule depends on the run's step only."""

    def update(updates, state, params=None, *, learning_rate, **_):
        return optax.tree.scale(-learning_rate, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]
