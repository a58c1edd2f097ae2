"""Builds the abstract model of a run, and loads or initializes its weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax.adapters.attach import attach_adapters, method
from sft_jax.adapters.lora import LoRA
from sft_jax.config import LoraConfig
from sft_jax.cpu_compiler import cpu_options
from sft_jax.files.digests import Words
from sft_jax.hf.load import load_params
from sft_jax.hf.peft import load_adapter
from sft_jax.hf.reader import Reader
from sft_jax.models.architecture import Architecture
from sft_jax.models.attention.backend import Backend, any_length_backend
from sft_jax.models.decoder import Decoder
from sft_jax.models.eight_bit import FORMATS
from sft_jax.models.quantized import Matrix, QuantizedMatrix, attach_factors, attach_quantization
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
    compute: str | None = None,
) -> Split:
    """Returns the abstract model, split into trainable and frozen parameters; allocates nothing.

    Args:
        lora: the adapter config; None for no adapters.
        dtype: dtype of computation and frozen weights.
        remat: a key of :data:`sft_jax.models.remat.POLICIES`.
        embeddings: also train the embeddings and ``lm_head``.
        full: train every base weight; by default if there are no adapters.
        backend: the attention backend; by default one for sequences of any length.
        quantization: format of frozen matrices, ``nf4`` or ``int8``; None for ``dtype``.
        param_dtype: dtype of trained base weights; adapters are float32.
        compute: a key of :data:`sft_jax.models.eight_bit.FORMATS`, for products of linear layers in eight bits. Frozen
            weights of decoder layers are stored so.

    Raises:
        UserError: a LoRA target module matches nothing, or a layer cannot be quantized.
    """

    full = lora is None if full is None else full

    def network() -> Decoder:
        device = mesh.devices.flat[0]
        attention = backend or any_length_backend(device)
        rounding = None if compute is None else FORMATS[compute]
        model = Decoder(arch, jax.random.key(0), jnp.dtype(dtype), remat, attention, rounding)
        if lora is not None:
            variant = method(lora.method)(lora.rank, lora.alpha, lora.dropout, form_on(mesh, dtype, compute))
            attach_adapters(model, variant, lora.target_modules)
        if quantization is not None:
            attach_quantization(model, quantization, embeddings=not embeddings)
        if compute is not None and not full:
            attach_factors(model, compute)
        return model

    return split_params(nnx.eval_shape(network), mesh, full, embeddings, param_dtype)


def form_on(mesh: Mesh, dtype: str, compute: str | None = None) -> str:
    """Returns how adapters are added to products; see :func:`sft_jax.models.projection.project`."""
    platform = mesh.devices.flat[0].platform
    # Other platforms round float32 inputs of products. On several devices, merging would all-gather the float32 sums
    # instead of the stored weights. A sum would be rounded to eight bits together with its adapter.
    if platform == "cpu" and mesh.size == 1 and dtype == "float32" and compute is None:
        return "merged"
    return "joined" if platform == "tpu" and mesh.shape["tensor"] == 1 else "separate"


def load_weights(
    split: Split,
    reader: Reader | None,
    lora: LoraConfig | None = None,
    old_vocab_size: int | None = None,
    seed: int = 0,
    part: str = "all",
    frozen: Params | None = None,
    digests: dict[str, Words] | None = None,
) -> tuple[Params, Params]:
    """Loads or initializes trainable and frozen parameters, sharded on the mesh.

    Args:
        reader: the base model's files; None initializes random weights (pretraining).
        lora: the adapter config. ``init_from`` loads a PEFT adapter; otherwise, and with None, adapters are initialized
            such that the model equals the base model.
        old_vocab_size: vocabulary size of the files, if the run adds tokens.
        part: ``all``, ``frozen`` (before a checkpoint restores the trainable ones) or ``trainable``. Tensors of the
            other part are checked but not read.
        frozen: the frozen parameters, if they are already loaded and ``part`` is ``trainable``.
        digests: receives the digest of each tensor that is read from ``reader``.

    Raises:
        UserError: a tensor is missing, unexpected or has the wrong shape, or the adapter does not fit.
    """
    trainable, base, adapter = flatten(split.trainable), split.base(), split.adapter()
    trained = base.keys() & trainable.keys()
    paths = {"all": base.keys(), "frozen": base.keys() - trained, "trainable": trained}[part]
    if reader is not None:
        loaded = load_params(reader, base, split.stored, paths, split.arch, old_vocab_size, digests)
    else:
        assert not split.quantized, "random weights are trained"
        leaves = trainable | flatten(split.frozen)
        loaded = _random_weights(split.arch, {path: leaves[path] for path in paths}, seed)
    if part != "frozen" and lora is not None and lora.init_from is not None:
        loaded |= load_adapter(lora.init_from, split)
    elif part != "frozen" and adapter:
        loaded |= _fresh_adapter(split, loaded if frozen is None else loaded | flatten(frozen), seed)
    return (
        unflatten({path: loaded[path] for path in trainable if path in loaded}),
        unflatten({path: loaded[path] for path in flatten(split.frozen) if path in loaded}),
    )


def _fresh_adapter(split: Split, weights: dict[Path, Array], seed: int) -> dict[Path, Array]:
    """Initializes all adapter parameters in one program, which runs once."""
    variant, adapter = split.variant, split.adapter()
    assert isinstance(variant, LoRA)

    def initialize(weights: dict[Path, Array]) -> dict[Path, Array]:
        key = jax.random.key(seed)
        return variant.initialize(adapter, split.layers, key, lambda path: _weight_of(split, path, weights))

    shardings = {path: leaf.sharding for path, leaf in adapter.items()}
    options = cpu_options(split.mesh.devices.flat[0])
    return jax.jit(initialize, out_shardings=shardings, compiler_options=options)(weights)


def _weight_of(split: Split, path: Path, leaves: dict[Path, Array]) -> Matrix:
    """Returns the weight of the linear layer that an adapter parameter belongs to."""
    weight = (*path[:-1], "weight")
    if weight not in split.quantized:
        return leaves[weight]
    fmt = split.quantized[weight].fmt
    return QuantizedMatrix({name: leaves[*weight, name] for name in fmt.array_specs()}, fmt)


def _random_weights(arch: Architecture, abstract: dict[Path, jax.ShapeDtypeStruct], seed: int) -> dict[Path, Array]:
    if not abstract:
        return {}

    def init() -> dict[Path, Array]:
        state = nnx.state(Decoder(arch, jax.random.key(seed)))
        leaves = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        return {path: leaves[path][...].astype(leaf.dtype) for path, leaf in abstract.items()}

    return jax.jit(init, out_shardings={path: leaf.sharding for path, leaf in abstract.items()})()
