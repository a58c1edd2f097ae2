"""The network of a run and its weights: built without memory, then read, drawn or continued into place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax.adapters.attach import attach_adapters, method
from sft_jax.adapters.lora import LoRA
from sft_jax.config import LoraConfig
from sft_jax.hf.load import load_params
from sft_jax.hf.peft import load_adapter
from sft_jax.hf.reader import TensorReader
from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import Backend, any_length_backend
from sft_jax.models.decoder import Decoder
from sft_jax.models.quantized import Matrix, Packed, attach_quantization
from sft_jax.models.split import Split, split_params
from sft_jax.tree import Params, Path, flatten, unflatten
from sft_jax.typing import Array


def build(
    arch: Architecture,
    mesh: Mesh,
    lora: LoraConfig | None,
    dtype: str,
    remat: str = "full",
    embeddings: bool = False,
    full: bool | None = None,
    backend: Backend | None = None,
    quantization: str | None = None,
    param_dtype: str = "float32",
) -> Split:
    """The network, taken apart into trainable and frozen leaves; nothing is allocated.

    Args:
        lora: None for no adapters.
        dtype: of compute and frozen weights.
        remat: a key of :data:`sft_jax.models.remat.POLICIES`.
        embeddings: train the embeddings and ``lm_head`` besides adapters.
        full: train every base weight; by default where there are no adapters.
        backend: of attention; by default one that takes sequences of any length.
        quantization: how frozen matrices are kept, ``nf4`` or ``int8``; None for ``dtype``. Trained ones are not.
        param_dtype: of base weights that are trained; adapters are float32.

    Raises:
        UserError: a LoRA target that matches nothing, a layer that cannot be quantised.
    """

    def network() -> Decoder:
        device = mesh.devices.flat[0]
        model = Decoder(arch, jax.random.key(0), jnp.dtype(dtype), remat, backend or any_length_backend(device))
        if lora is not None:
            # Other platforms round float32 before they multiply; what devices share they would gather as sums, in
            # float32, and not as it is kept.
            merged = device.platform == "cpu" and mesh.size == 1 and dtype == "float32"
            variant = method(lora.method)(lora.rank, lora.alpha, lora.dropout, merged)
            attach_adapters(model, variant, lora.target_modules)
        if quantization is not None:
            attach_quantization(model, quantization, embeddings=not embeddings)
        return model

    full = lora is None if full is None else full
    return split_params(nnx.eval_shape(network), mesh, full, embeddings, param_dtype)


def load_weights(
    split: Split,
    reader: TensorReader | None,
    lora: LoraConfig | None = None,
    old_vocab_size: int | None = None,
    seed: int = 0,
    part: str = "all",
    frozen: Params | None = None,
) -> tuple[Params, Params]:
    """Trainable and frozen leaves, in place on the mesh.

    Args:
        reader: the base model's files; None draws random weights (pretraining).
        lora: where its adapter comes from: fresh, or a PEFT folder. Fresh adapters change nothing, so with None what
            is loaded computes what the base model does.
        old_vocab_size: of the files, where tokens were added.
        part: ``all``, ``frozen`` (a checkpoint is about to give the trainable ones) or ``trainable``; the other leaves
            are checked, not read.
        frozen: the frozen leaves, where they are there already and only the ``trainable`` part is asked for.

    Raises:
        UserError: a tensor is missing, has the wrong shape or no place; an adapter that does not fit.
    """
    trainable, base, adapter = flatten(split.trainable), split.base(), split.adapter()
    trained = base.keys() & trainable.keys()
    wanted = {"all": base.keys(), "frozen": base.keys() - trained, "trainable": trained}[part]
    key = jax.random.key(seed)
    if reader is not None:
        tied = split.arch.tie_word_embeddings
        loaded = load_params(reader, base, split.stored, wanted, tied, old_vocab_size)
    else:
        assert not split.quantized, "random weights are trained"
        leaves = trainable | flatten(split.frozen)
        loaded = _random_weights(split.arch, {path: leaves[path] for path in wanted}, key)
    if part != "frozen" and lora is not None and lora.init_from is not None:
        loaded |= load_adapter(lora.init_from, split)
    elif part != "frozen" and adapter:
        assert isinstance(split.variant, LoRA)
        there = loaded if frozen is None else loaded | flatten(frozen)
        loaded |= split.variant.initialise(adapter, split.layers, key, lambda path: _weight_beside(split, path, there))
    return (
        unflatten({path: loaded[path] for path in trainable if path in loaded}),
        unflatten({path: loaded[path] for path in flatten(split.frozen) if path in loaded}),
    )


def _weight_beside(split: Split, path: Path, leaves: dict[Path, Array]) -> Matrix:
    """The weight of the linear layer that an adapter parameter belongs to."""
    weight = (*path[:-1], "weight")
    if weight not in split.quantized:
        return leaves[weight]
    fmt = split.quantized[weight].fmt
    return Packed({name: leaves[*weight, name] for name in fmt.pieces()}, fmt)


def _random_weights(arch: Architecture, wanted: dict[Path, jax.ShapeDtypeStruct], key: Array) -> dict[Path, Array]:
    if not wanted:
        return {}

    def init() -> dict[Path, Array]:
        leaves = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(Decoder(arch, key)))}
        return {path: leaves[path][...].astype(leaf.dtype) for path, leaf in wanted.items()}

    return jax.jit(init, out_shardings={path: leaf.sharding for path, leaf in wanted.items()})()
