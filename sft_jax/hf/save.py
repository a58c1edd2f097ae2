"""Writing tensors as a Hugging Face folder: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 5 * 10**9


def save_tensors(
    folder: Path,
    sizes: dict[str, int],
    get: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with an index above ``shard_bytes``.

    Args:
        sizes: bytes of each tensor by Hugging Face name, in the order they are written.
        get: makes one tensor; called once a tensor, a shard at a time, so no more than a shard is held in memory.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        save_file({name: np.ascontiguousarray(get(name)) for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
