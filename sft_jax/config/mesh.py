"""The section ``mesh``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sft_jax.config.checks import require


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1 takes all remaining devices."""

    data: int = 1  # number of model replicas
    fsdp: int = -1  # shards of the weights and the batch
    sequence: int = 1  # shards of each sequence, for long contexts
    tensor: int = 1  # shards of attention heads, MLP channels and vocabulary

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name}", f"{size} is neither -1 nor a positive number")
        require(list(sizes.values()).count(-1) <= 1, "mesh", f"only one axis may be -1, not {sizes}")
