"""Nemotron-H and Nemotron 3: each layer is a Mamba-2 mixer, attention, a plain MLP or a mixture of plain experts."""

import math
from typing import Any

from sft_jax.errors import UserError
from sft_jax.models.architecture import Architecture, Branch, Layer, Norm, Sublayer
from sft_jax.models.families import glm4_moe, hybrid, standard
from sft_jax.models.mlp import MLPSpec
from sft_jax.models.moe.experts import ExpertsSpec
from sft_jax.models.moe.mixture import Latent, MixtureSpec
from sft_jax.models.recurrent.mamba2 import Mamba2Spec

# The norm of each layer and the one at the end have names that differ in other families.
TENSORS = (
    ("embed_tokens", "embeddings"),
    ("norm", "norm_f"),
    ("pre_norm", "norm"),
    *((f"mixer.experts.{name}.weight", f"mixer.experts.{{expert}}.{name}.weight") for name in ("up_proj", "down_proj")),
)


def read(config: Any) -> Architecture:
    if config.sliding_window is not None:
        raise UserError(f"sliding_window: {config.sliding_window} is not supported; supported is null")
    norm = Norm(config.layer_norm_epsilon)
    specs = {
        "linear_attention": _mamba(config, norm),
        "full_attention": standard.attention(config, rope=None),
        "mlp": _mlp(config, config.intermediate_size),
        "moe": _experts(config),
    }
    layers = tuple(
        Layer((Sublayer((Branch("mixer", spec, "pre_norm"),)),), norm) for spec in hybrid.by_type(config, specs)
    )
    return standard.architecture(
        config,
        layers,
        norm,
        tensors=TENSORS,
        prefix="backbone.",
        module_prefix="model.",
        layouts=(("model.", "lm_head"),),
        outside=("mtp.",),  # multi-token prediction
    )


def _mlp(config: Any, size: int) -> MLPSpec:
    return MLPSpec(size, standard.activation(config, "mlp_hidden_act"), bool(config.mlp_bias), gated=False)


def _experts(config: Any) -> MixtureSpec:
    latent = None
    if config.moe_latent_size is not None:
        latent = Latent(config.moe_latent_size, "fc1_latent_proj", "fc2_latent_proj", bool(config.mlp_bias))
    return MixtureSpec(
        glm4_moe.router(config),
        ExpertsSpec(config.moe_intermediate_size, standard.activation(config, "mlp_hidden_act"), gated=False),
        shared=_mlp(config, config.moe_shared_expert_intermediate_size),
        latent=latent,
    )


def _mamba(config: Any, norm: Norm) -> Mamba2Spec:
    bias = bool(config.use_bias)
    if config.mamba_num_heads % config.n_groups:
        raise UserError(f"n_groups {config.n_groups} does not divide {config.mamba_num_heads} mamba_num_heads")
    return Mamba2Spec(
        config.mamba_num_heads,
        config.mamba_head_dim,
        config.n_groups,
        config.ssm_state_size,
        norm,
        conv_size=config.conv_kernel,
        conv_bias=bool(config.use_conv_bias),
        in_bias=bias,
        out_bias=bias,
        activation=standard.activation(config, "mamba_hidden_act"),
        # As in transformers, which does not read time_step_limit.
        time_step_limit=(config.time_step_min, math.inf),
    )
