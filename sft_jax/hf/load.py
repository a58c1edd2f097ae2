"""Base weights straight from safetensors into sharded arrays."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.names import is_stacked, is_transposed, tensor_names
from sft_jax.hf.reader import TensorReader
from sft_jax.tree import Path
from sft_jax.typing import Array

# Buffers that older exports carry and that follow from the config.
_IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def load_params(
    reader: TensorReader,
    abstract: dict[Path, jax.ShapeDtypeStruct],
    wanted: Collection[Path],
    num_layers: int,
    tied: bool,
    old_vocab_size: int | None = None,
) -> dict[Path, Array]:
    """Read the ``wanted`` leaves in their dtype and sharding; each device gets only its own part.

    ``abstract`` describes all base leaves, which are checked against the files before the first is read.

    Where ``old_vocab_size`` is smaller than the vocabulary of ``abstract``, the added rows of the token table and
    columns of the head start at the mean of the existing ones (Hewitt 2021), so that the added tokens begin as
    likely as an average token and bound its logit from above.

    Raises:
        UserError: a tensor is missing, has another shape, or is in the files but has no place in the network.
    """
    _check(reader, abstract, num_layers, tied, old_vocab_size)
    return {
        path: _load_leaf(reader, path, leaf, num_layers, old_vocab_size)
        for path, leaf in abstract.items()
        if path in wanted
    }


def expected_shapes(abstract: dict[Path, Any], num_layers: int) -> dict[str, tuple[int, ...]]:
    """File tensor name to file shape, of every leaf."""
    shapes = {}
    for path, leaf in abstract.items():
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        shape = shape[::-1] if is_transposed(path) else shape
        shapes |= dict.fromkeys(tensor_names(path, num_layers), tuple(shape))
    return shapes


def _check(reader: TensorReader, abstract: dict, num_layers: int, tied: bool, old_vocab_size: int | None) -> None:
    expected = expected_shapes(abstract, num_layers)
    if old_vocab_size is not None:
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(expected):
            expected[name] = (old_vocab_size, *expected[name][1:])
    for name, shape in expected.items():
        if name not in reader.names:
            raise UserError(f"{reader.folder}: tensor {name} is missing")
        if reader.shape(name) != shape:
            raise UserError(
                f"{reader.folder}: tensor {name} has shape {reader.shape(name)}, config.json asks for {shape}"
            )
        reader.dtype(name)
    allowed = {"lm_head.weight"} if tied else set()
    extra = sorted(name for name in reader.names - set(expected) - allowed if not name.endswith(_IGNORED))
    if extra:
        raise UserError(f"{reader.folder}: tensor {extra[0]} has no place in this model ({len(extra)} such tensors)")


def _load_leaf(
    reader: TensorReader, path: Path, leaf: jax.ShapeDtypeStruct, num_layers: int, old_vocab_size: int | None
) -> Array:
    names = tensor_names(path, num_layers)
    vocab_dim = 1 if is_transposed(path) else 0
    grows = path[0] in ("embed_tokens", "lm_head") and old_vocab_size not in (None, leaf.shape[vocab_dim])

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = reader.read(name, index[::-1] if is_transposed(path) else index)
        return part.T if is_transposed(path) else part

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if is_stacked(path):
            layers, *rest = index
            data = np.stack([read(name, tuple(rest)) for name in names[layers]])
        elif grows:
            table = np.asarray(reader.read(names[0]))
            added = leaf.shape[vocab_dim] - table.shape[0]
            mean = table.astype(np.float32).mean(axis=0, keepdims=True).astype(table.dtype)
            table = np.concatenate([table, np.repeat(mean, added, axis=0)])
            data = (table.T if is_transposed(path) else table)[index]
        else:
            data = read(names[0], index)
        return np.ascontiguousarray(data).astype(jnp.dtype(leaf.dtype))

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)  # type: ignore[arg-type]
