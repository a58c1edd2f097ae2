"""What an export should compute: a run, with its weights merged and rounded as its files are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from sft_jax.adapters.lora import LoRA
from sft_jax.assembly import Model
from sft_jax.hf.reader import TensorReader
from sft_jax.models.split import Split, is_adapter
from sft_jax.training.rounding import convert, round_for_file
from sft_jax.training.weights import build
from sft_jax.tree import Path, flatten, unflatten

IsKept = Callable[[str, np.ndarray, np.dtype], bool]


def merged(model: Model) -> Model:
    """The same model with its adapter merged into the weights, in float32 and not rounded.

    Args:
        model: in float32, not quantized; returned as it is if it has no adapter.
    """
    split = model.split
    if not isinstance(split.variant, LoRA):
        return model
    variant, leaves = split.variant, _leaves(model)
    adapters: dict[Path, dict[str, np.ndarray]] = {}
    for path in leaves:
        if is_adapter(split.labels[path]):
            adapters.setdefault(path[:-1], {})[path[-1]] = leaves[path]

    def value(path: Path) -> np.ndarray:
        if path[-1] != "weight" or path[:-1] not in adapters:
            return leaves[path]
        result = leaves[path].copy()
        for index in np.ndindex(*split.stored[path].stack):
            parameters = {name: one[index] for name, one in adapters[path[:-1]].items()}
            if variant.changes(parameters):
                result[index] = variant.merge(result[index], parameters)
        return result

    return _with_values(model, build(split.arch, split.mesh, None, "float32", remat="none", full=False), value)


def rounded(model: Model, reader: TensorReader, names: Callable[[Path], Sequence[str]], is_kept: IsKept) -> Model:
    """The same model with the values that its files can hold.

    Rounding to bfloat16 moves logits much more than an error of an export would. Compared with this model, an export in
    any dtype has to agree as closely as one in float32.

    Args:
        reader: the exported files; only their names and dtypes are used.
        names: the names of a parameter's tensors in these files.
        is_kept: whether a tensor, by its name, values and dtype in the exported files, is still that of the base model,
            which is rounded to nearest.
    """
    leaves = _leaves(model)

    def value(path: Path) -> np.ndarray:
        stored, result = model.split.stored[path], leaves[path]
        for number, name in enumerate(names(path)):
            if name in reader.names and (dtype := reader.dtype(name)).itemsize < 4:
                result = result if result is not leaves[path] else result.copy()
                tensor = stored.columns(result[(*stored.index(number), ...)], number)
                kept = is_kept(stored.names[number], stored.tensor(result, number), dtype)
                to_dtype = convert if kept else round_for_file
                tensor[...] = to_dtype(tensor, dtype, stored.names[number]).astype(np.float32)
        return result

    return _with_values(model, model.split, value)


def _leaves(model: Model) -> dict[Path, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in (flatten(model.params) | flatten(model.frozen)).items()}


def _with_values(model: Model, split: Split, value: Callable[[Path], np.ndarray]) -> Model:
    def place(abstract: dict[Path, jax.ShapeDtypeStruct]) -> dict:
        return unflatten({path: jax.device_put(value(path), leaf.sharding) for path, leaf in abstract.items()})

    params, frozen = place(flatten(split.trainable)), place(flatten(split.frozen))
    return Model(model.description, split, params, frozen, model.tokenizer, model.stop_ids)
