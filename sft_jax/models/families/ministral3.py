"""Ministral 3: Mistral whose queries grow with their position in long contexts."""

from typing import Any

from sft_jax.models.architecture import Architecture, Temperature
from sft_jax.models.families import standard


def read(config: Any) -> Architecture:
    rope = config.rope_parameters
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    temperature = None if beta is None else Temperature(float(beta), int(length))
    return standard.decoder(config, standard.attention(config, temperature=temperature), standard.mlp(config))
