"""The network of a run and its weights: built without memory, then read, drawn or continued into place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax.architecture import Architecture
from sft_jax.config import LoraConfig
from sft_jax.hf.load import load_params
from sft_jax.hf.peft import load_adapter
from sft_jax.hf.reader import TensorReader
from sft_jax.models.attention.kernel import Kernel, any_length_kernel
from sft_jax.models.decoder import Decoder
from sft_jax.models.lora import Split, attach_lora, init_adapter, is_adapter, split_params
from sft_jax.models.quantized import attach_quantization
from sft_jax.tree import Params, Path, flatten, unflatten
from sft_jax.typing import Array


def build(
    arch: Architecture,
    mesh: Mesh,
    lora: LoraConfig | None,
    dtype: str,
    remat: str = "full",
    token_table: bool = False,
    full: bool | None = None,
    kernel: Kernel | None = None,
    quantization: str | None = None,
    weights: str = "float32",
) -> Split:
    """The network, taken apart into trainable and frozen leaves; nothing is allocated.

    Args:
        lora: None for no adapters.
        dtype: of compute and frozen weights.
        remat: a key of :data:`sft_jax.models.remat.POLICIES`.
        token_table: train token table and output head besides adapters.
        full: train every base weight; by default where there are no adapters.
        kernel: of attention; by default one that takes rows of any length.
        quantization: how frozen matrices are kept, ``nf4`` or ``int8``; None for ``dtype``. Trained ones are not.
        weights: dtype of base weights that are trained; adapters are float32.

    Raises:
        UserError: a LoRA target that matches nothing, a layer that cannot be quantised.
    """

    def network() -> Decoder:
        device = mesh.devices.flat[0]
        attention = kernel or any_length_kernel(device)
        model = Decoder(arch, jax.random.key(0), jnp.dtype(dtype), remat, attention)
        if lora is not None:
            # Other platforms round float32 before they multiply; what devices share they would gather as sums, in
            # float32, and not as it is kept.
            merged = device.platform == "cpu" and mesh.size == 1 and dtype == "float32"
            attach_lora(model, lora.rank, lora.alpha, lora.target_modules, lora.dropout, merged)
        if quantization is not None:
            attach_quantization(model, quantization, tables=not token_table)
        return model

    full = lora is None if full is None else full
    return split_params(nnx.eval_shape(network), mesh, full, token_table, weights)


def load_weights(
    split: Split,
    arch: Architecture,
    reader: TensorReader | None,
    lora: LoraConfig | None = None,
    old_vocab_size: int | None = None,
    seed: int = 0,
    part: str = "all",
) -> tuple[Params, Params]:
    """Trainable and frozen leaves, in place on the mesh.

    Args:
        reader: the base model's files; None draws random weights (pretraining).
        lora: where its adapter comes from: fresh, or a PEFT folder. Fresh adapters change nothing, so with None what
            is loaded computes what the base model does.
        old_vocab_size: of the files, where tokens were added.
        part: ``all``, ``frozen`` (a checkpoint is about to give the trainable ones) or ``trainable``; the other leaves
            are checked, not read.

    Raises:
        UserError: a tensor is missing, has the wrong shape or no place; an adapter that does not fit.
    """
    trainable, frozen, base = flatten(split.trainable), flatten(split.frozen), split.base()
    adapter = {path: leaf for path, leaf in trainable.items() if is_adapter(path)}
    trained = base.keys() & trainable.keys()
    wanted = {"all": base.keys(), "frozen": base.keys() - trained, "trainable": trained}[part]
    key = jax.random.key(seed)
    if reader is not None:
        loaded = load_params(reader, base, wanted, arch.num_layers, arch.tie_word_embeddings, old_vocab_size)
    else:
        assert not split.quantized, "random weights are trained"
        leaves = trainable | frozen
        loaded = _random_weights(arch, {path: leaves[path] for path in wanted}, key)
    if part != "frozen" and lora is not None and lora.init_from is not None:
        loaded |= load_adapter(lora.init_from, trainable, arch.num_layers, lora.rank, lora.alpha)
    elif part != "frozen" and adapter:
        loaded |= init_adapter(adapter, key)
    return (
        unflatten({path: loaded[path] for path in trainable if path in loaded}),
        unflatten({path: loaded[path] for path in frozen if path in loaded}),
    )


def _random_weights(arch: Architecture, wanted: dict[Path, jax.ShapeDtypeStruct], key: Array) -> dict[Path, Array]:
    if not wanted:
        return {}

    def init() -> dict[Path, Array]:
        leaves = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(Decoder(arch, key)))}
        return {path: leaves[path][...].astype(leaf.dtype) for path, leaf in wanted.items()}

    return jax.jit(init, out_shardings={path: leaf.sharding for path, leaf in wanted.items()})()
