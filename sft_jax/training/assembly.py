"""The backend, the network and the step that a config describes: the same ones for a run and for a plan of it."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from sft_jax.config import Config
from sft_jax.data.packing import row_lengths
from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import Backend, choose_backend
from sft_jax.models.split import Split
from sft_jax.training.cross_entropy import Terms
from sft_jax.training.optimizer import make_schedule
from sft_jax.training.step import TrainStep, make_train_step
from sft_jax.training.weights import build


def backend_of(config: Config, arch: Architecture, mesh: Mesh) -> Backend:
    """The attention backend for sequences of every length that comes; see :func:`choose_backend`.

    Raises:
        UserError: the backend that was asked for cannot compute this.
    """
    length = math.gcd(*row_lengths(config.data))
    return choose_backend(config.model.attention, mesh, arch.attention_specs, config.model.dtype, length)


def network_of(
    config: Config, arch: Architecture, mesh: Mesh, backend: Backend, embeddings: bool, remat: str = "full"
) -> Split:
    """The network, taken apart into trainable and frozen leaves; see :func:`sft_jax.training.weights.build`."""
    model = config.model
    return build(
        arch,
        mesh,
        config.lora,
        model.dtype,
        remat,
        embeddings,
        backend=backend,
        quantization=model.quantization,
        param_dtype=model.param_dtype,
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
        training.num_microbatches,
        jax.random.fold_in(key, 1) if dropout else None,
        shardings,
        num_sources,
        Terms(training.label_smoothing, training.z_loss),
        jax.random.fold_in(key, 3),
    )
