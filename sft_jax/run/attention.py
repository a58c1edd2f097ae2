"""Settles the attention backend of a run before any weight is loaded."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import Mesh

from sft_jax.config import Config
from sft_jax.data.batches.packing import sequence_lengths
from sft_jax.distributed.processes import gather
from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import CHECKED, check_backend, choose_backend
from sft_jax.models.attention.parity import Refused
from sft_jax.run.announce import Announcer


def settle_attention(config: Config, arch: Architecture, mesh: Mesh, say: Announcer) -> Config:
    """Returns the config to build the network from, with a backend that runs on the devices of all processes.

    ``model.attention: auto`` takes the next backend where one refuses, and says why. The last one, ``xla``, runs
    everywhere.

    Raises:
        Refused: the requested backend does not run here.
        UserError: it is not supported here, or a backend is wrong on this device.
    """
    model, specs, refused = config.model, arch.attention_specs, dict[str, str]()
    length, deterministic = math.gcd(*sequence_lengths(config.data)), config.training.deterministic
    while True:
        backend = choose_backend(model.attention, mesh, specs, model.dtype, length, deterministic, refused)
        if backend.name not in CHECKED:
            break
        reason = ""
        try:
            check_backend(backend, mesh, specs, config.data.max_length)
        except Refused as error:
            if model.attention != "auto":
                raise
            reason = error.reason
        reasons = gather("attention backend", reason)
        if not any(reasons):
            break
        refused[backend.name] = next(filter(None, reasons))
        say("attention", f"{backend.name} does not run here, so auto takes the next backend: {refused[backend.name]}")
    if not refused:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=backend.name))
