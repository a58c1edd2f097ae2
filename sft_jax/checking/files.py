"""Checks the tensors of files against a network, by name, shape and bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from sft_jax.assembly import Base, Model
from sft_jax.checking.result import FAILED, NOT_CHECKED, OK, Result, verdict
from sft_jax.errors import UserError
from sft_jax.hf.config import read_config
from sft_jax.hf.load import expected_shapes, find_mismatch, load_params
from sft_jax.hf.peft import ADAPTER_FILE, names_in_adapter
from sft_jax.hf.reader import Reader, TensorReader
from sft_jax.models.split import Split
from sft_jax.models.tensors import Stored
from sft_jax.sharding import make_mesh
from sft_jax.training.compilation import free_bytes
from sft_jax.training.weights import build
from sft_jax.tree import flatten


def num_params(split: Split) -> int:
    """The number of parameters of a network without adapters; tied embeddings count once."""
    return sum(math.prod(leaf.shape) for leaf in split.base().values())


def check_architecture(base: Base, split: Split) -> Result:
    """What ``config.json`` asks for, beside what the files are stored in."""
    arch, config = split.arch, read_config(base.folder)
    asked = config.get("dtype") or config.get("torch_dtype") or "no dtype"
    tied = "tied" if arch.tie_word_embeddings else "untied"
    details = (
        f"{arch.family}, {num_params(split):,} parameters, {arch.num_layers} layers, {arch.hidden_size} wide, "
        f"{arch.vocab_size:,} embeddings ({tied}), context {arch.max_positions:,}; config.json asks for "
        f"{', '.join(config.get('architectures') or ['no class'])} in {asked}"
    )
    return Result("architecture", OK, details, {"num_params": num_params(split)})


def check_names(base: Base, split: Split) -> Result:
    """Whether every parameter has its tensors in the files in the right shape, and every tensor has a place."""
    if base.reader is None:
        return Result("tensors", NOT_CHECKED, "the run started from random weights, so there are no files")
    expected = expected_shapes(split.base(), split.stored, base.arch.vocab_size)
    found = find_mismatch(base.reader, expected, base.arch)
    present = len(expected) - len(found.missing) - len(found.reshaped)
    placed = len(base.reader.names) - len(found.extra)
    numbers = {"num_expected": len(expected), "num_in_files": len(base.reader.names), "num_present": present}
    details = (
        f"{present} of {len(expected)} tensors of the network are in the files in its shape, "
        f"{placed} of {len(base.reader.names)} tensors in the files have a place"
    )
    ignored = sorted(base.reader.names - set(expected) - set(found.extra))
    details += f"; not read: {_some(ignored)}" if ignored else ""
    for problem, names in (
        ("missing", found.missing),
        ("of another shape", found.reshaped),
        ("without a place", found.extra),
    ):
        details += f"; {problem}: {_some(names)}" if names else ""
    return Result("tensors", verdict(not (found.missing or found.reshaped or found.extra)), details, numbers)


def check_bytes(base: Base) -> Result:
    """Whether parameters that are loaded and written back under their names are byte-equal with the files.

    Holds one parameter (a stack of layers) at a time. It is loaded in bfloat16 if all tensors are, else in float32,
    which holds bfloat16 and float16 exactly.
    """
    name, reader = "round trip", base.reader
    if reader is None:
        return Result(name, NOT_CHECKED, "the run started from random weights, so there are no files")
    device = jax.devices("cpu")[0]
    mesh = make_mesh(devices=[device])
    abstract = build(base.arch, mesh, None, "float32", remat="none", full=False)
    try:
        kinds = Counter(str(reader.dtype(one)) for path in abstract.base() for one in abstract.stored[path].names)
    except UserError as error:
        return Result(name, FAILED, str(error))
    if set(kinds) == {"bfloat16"}:
        abstract = build(base.arch, mesh, None, "bfloat16", remat="none", full=False)
    leaves = abstract.base()
    largest = max(math.prod(leaf.shape) for leaf in leaves.values()) * (2 if set(kinds) == {"bfloat16"} else 4)
    if (reason := too_large(2 * largest, free_bytes(device))) is not None:
        return Result(name, NOT_CHECKED, reason)
    different: list[str] = []
    try:
        for path in sorted(leaves):
            stored = abstract.stored[path]
            host = np.asarray(load_params(reader, leaves, abstract.stored, [path], base.arch)[path])
            different += _different(reader, stored, host, stored.names)
    except UserError as error:  # a weight that is not finite, or a truncated file
        return Result(name, FAILED, str(error))
    num_bytes = sum(math.prod(reader.shape(one)) * reader.dtype(one).itemsize for one in reader.names)
    stored_as = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    details = f"{sum(kinds.values())} tensors ({stored_as}), {num_bytes / 1e6:,.1f} MB, loaded and written back"
    details += f": other bytes in {_some(different)}" if different else " byte for byte"
    return Result(name, verdict(not different), details, {"num_bytes": num_bytes, "num_different": len(different)})


def check_adapter_bytes(folder: Path, model: Model) -> Result:
    """The same for the tensors of a PEFT adapter."""
    reader = TensorReader(folder, ADAPTER_FILE)
    different, count = [], 0
    for path, leaf in (flatten(model.params) | flatten(model.frozen)).items():
        stored, names = model.split.stored[path], names_in_adapter(model.split, path)
        if reader.names.issuperset(names):
            different += _different(reader, stored, np.asarray(leaf), names)
            count += len(names)
    details = f"{count} of {len(reader.names)} tensors of the adapter, loaded and written back"
    details += f": other bytes in {_some(different)}" if different else " byte for byte"
    passed = not different and count == len(reader.names)
    return Result("adapter", verdict(passed), details, {"num_different": len(different)})


def too_large(needed: float, available: int | None) -> str | None:
    """Why something is not computed; None if it fits, or if the free memory is unknown."""
    if available is None or needed <= available:
        return None
    return f"needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB available"


def _different(reader: Reader, stored: Stored, host: np.ndarray, names: Iterable[str]) -> list[str]:
    """The names of the tensors whose bytes are not those of a loaded parameter."""
    return [
        name
        for number, name in enumerate(names)
        if stored.as_in_file(host, number, reader.dtype(name)).tobytes() != reader.read(name).tobytes()
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
