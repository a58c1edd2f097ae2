"""The kernel, the network and the step that a config describes: the same ones for a run and for a plan of it."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from sft_jax.architecture import Architecture
from sft_jax.config import Config
from sft_jax.data.packing import row_lengths
from sft_jax.models.attention.kernel import Kernel, choose_kernel
from sft_jax.models.lora import Split
from sft_jax.training.cross_entropy import Terms
from sft_jax.training.optimizer import make_schedule
from sft_jax.training.step import TrainStep, make_train_step
from sft_jax.training.weights import build


def kernel_of(config: Config, arch: Architecture, mesh: Mesh) -> Kernel:
    """The attention kernel for rows of every length that comes; see :func:`choose_kernel`.

    Raises:
        UserError: the kernel that was asked for cannot compute this.
    """
    row_length = math.gcd(*row_lengths(config.data))
    return choose_kernel(config.model.attention, mesh, arch, config.model.dtype, row_length)


def network_of(
    config: Config, arch: Architecture, mesh: Mesh, kernel: Kernel, token_table: bool, remat: str = "full"
) -> Split:
    """The network, taken apart into trainable and frozen leaves; see :func:`sft_jax.training.weights.build`."""
    model = config.model
    return build(
        arch,
        mesh,
        config.lora,
        model.dtype,
        remat,
        token_table,
        kernel=kernel,
        quantization=model.quantization,
        weights=model.weights,
    )


def step_of(
    config: Config,
    network: Split,
    optimizer: optax.GradientTransformationExtraArgs,
    total_steps: int,
    shardings: Any,
    num_sources: int,
) -> TrainStep:
    """The jitted train step; see :func:`sft_jax.training.step.make_train_step`.

    Args:
        total_steps: of the schedule.
        shardings: of the state.
        num_sources: whose losses are told apart; 0 for not at all.
    """
    training = config.training
    key = jax.random.key(training.seed)
    dropout = config.lora is not None and config.lora.dropout > 0
    return make_train_step(
        network,
        optimizer,
        make_schedule(config.optimizer, total_steps),
        training.gradient_accumulation_steps,
        jax.random.fold_in(key, 1) if dropout else None,
        shardings,
        num_sources,
        Terms(training.label_smoothing, training.z_loss),
        jax.random.fold_in(key, 3),
    )
