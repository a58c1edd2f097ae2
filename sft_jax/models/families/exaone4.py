"""EXAONE 4: norms after mixer and MLP and of each head; where layers are local, only those rotate."""

from typing import Any

from sft_jax.models.architecture import Architecture, Norm
from sft_jax.models.families import standard
from sft_jax.models.families.olmo2 import POST_NORM


def read(config: Any) -> Architecture:
    norm = Norm(config.rms_norm_eps)
    attention = standard.attention(config, qk_norm=norm)
    rotates_all = config.sliding_window is None
    return standard.decoder(
        config,
        attention,
        standard.mlp(config),
        norm,
        POST_NORM,
        lambda layer, window: attention.rope if rotates_all or window is not None else None,
    )
