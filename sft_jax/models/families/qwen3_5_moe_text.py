"""Qwen3.5 MoE: Qwen3.5 with a mixture of experts and a shared expert in each layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sft_jax.models.architecture import Architecture
from sft_jax.models.families import qwen2_moe, qwen3_5_text, standard
from sft_jax.models.families.standard import RouterSpec


def read(config: Any) -> Architecture:
    router = RouterSpec(config.num_experts, config.num_experts_per_tok)
    experts = standard.mixture(config, router, config.moe_intermediate_size, **qwen2_moe.shared_expert(config))
    mlps = [experts] * config.num_hidden_layers
    return qwen3_5_text.decoder(config, mlps, qwen3_5_text.PROJECTIONS, tensors=standard.expert_tensors())


def as_in_files(arch: Architecture, shape: Callable[[str], tuple[int, ...] | None]) -> Architecture:
    """Returns the architecture with the layout of the files: published ones have all experts in one tensor.

    transformers saves them one by one.
    """
    names = standard.experts_together()
    in_one = shape(f"{arch.prefix}layers.0.{names[0][1]}") is not None
    return replace(arch, tensors=(*names, *arch.tensors)) if in_one else arch
