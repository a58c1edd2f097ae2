"""Counts model FLOPs, which do not depend on the implementation, from the modules of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flax import nnx

from sft_jax.models.layers import Projection
from sft_jax.models.split import EMBEDDINGS, FROZEN, Split
from sft_jax.models.work import Work
from sft_jax.tree import Path


@dataclass(frozen=True)
class Product:
    """A linear layer ``[inputs, outputs]``, with the same layer of the other decoder layers.

    Attributes:
        name: module name.
        axes: logical axes of inputs and outputs.
        count: number of layers.
        share: fraction of the tokens that one layer multiplies; less than 1 for an expert.
        adapter_size: adapter parameters of one layer; 0 without an adapter.
        is_trained: whether the weight itself is trained.
    """

    name: str
    inputs: int
    outputs: int
    axes: tuple[str, str]
    count: int = 1
    share: float = 1.0
    adapter_size: int = 0
    is_trained: bool = False

    @property
    def size(self) -> int:
        """Parameters of all layers."""
        return self.count * self.inputs * self.outputs

    @property
    def active_size(self) -> float:
        """Parameters that are active for a token."""
        return self.size * self.share

    @property
    def active_adapter_size(self) -> float:
        """Adapter parameters that are active for a token."""
        return self.count * self.adapter_size * self.share

    @property
    def is_last(self) -> bool:
        """Whether it is the last of a decoder layer, so that no gradient needs its output."""
        return self.axes[0] in ("mlp", "expert_mlp")


@dataclass(frozen=True)
class Sizes:
    """The matrix products of a network."""

    products: tuple[Product, ...]  # of the decoder layers, and of their inputs
    head: Product
    mixers: tuple[tuple[int, Any], ...]  # number of layers, and their mixer module

    @classmethod
    def of(cls, split: Split) -> Sizes:
        """Reads them from the abstract network."""
        model = split.abstract()
        products, mixers = [], []
        for path, node in nnx.iter_graph(model):
            if isinstance(node, Projection) and path[0] not in EMBEDDINGS:
                products.append(_product(".".join(map(str, path)), node, split))
            elif hasattr(node, "mixing_flops"):
                mixers.append((len(split.layers(tuple(map(str, path)))), node))
        if model.lm_head is not None:
            head = _product("lm_head", model.lm_head, split)
        else:
            vocab, dim = model.embed_tokens.weight.shape
            is_trained = _is_trained(("embed_tokens", "weight"), split)
            head = Product("lm_head", dim, vocab, ("embed", "vocab"), is_trained=is_trained)
        return cls(tuple(products), head, tuple(mixers))

    def mixing_flops(self, work: Work) -> float:
        """FLOPs of mixing tokens, without projections, forward and backward."""
        return sum(count * module.mixing_flops(work) for count, module in self.mixers)


def _product(name: str, module: Projection, split: Split) -> Product:
    *stack, inputs, outputs = module.weight.shape
    count, path = math.prod(stack), tuple(name.split("."))
    adapter = sum(leaf.size for at, leaf in split.adapter().items() if at[:-1] == path)
    is_trained = _is_trained((*path, "weight"), split)
    return Product(name, inputs, outputs, module.axes, count, module.share, adapter // count, is_trained)


def _is_trained(weight: Path, split: Split) -> bool:
    return split.labels.get(weight, FROZEN) != FROZEN  # the leaves of a quantized weight have other paths


def model_flops(sizes: Sizes, work: Work) -> float:
    """FLOPs of the forward and backward pass; a multiply-add is two.

    A parameter costs 2 per token forward, 2 for the gradient of its input and, if it is trained, 2 for its own
    gradient: 4 per token where it is frozen, 6 where it is trained. Only active experts count. ``lm_head`` is applied
    to target tokens only. Attention is causal and stays within documents: two products of ``len² / 2`` scores forward
    and four backward, ``6 · len² · N · H`` per layer; a sliding window is ignored. A recurrence counts its operations
    on the state, token by token. Norms, rotary embeddings, softmax, convolutions, embeddings and rematerialization
    count as zero.
    """
    layers = sum(_passes(one) * one.active_size + 6.0 * one.active_adapter_size for one in sizes.products)
    head = _passes(sizes.head) * sizes.head.size * work.targets
    return layers * work.tokens + head + sizes.mixing_flops(work)


def _passes(product: Product) -> float:
    return 6.0 if product.is_trained else 4.0


def repeated_flops(sizes: Sizes, work: Work, remat: str) -> float:
    """FLOPs of rematerialization, which :func:`model_flops` leaves out: at most a forward pass of the layers.

    The last product of a layer is never recomputed, since no gradient needs it. ``full`` saves the outputs of
    ``lora_a`` and recomputes all others; ``attention`` saves those of attention too. ``dots`` and ``none`` recompute no
    product.
    """
    if remat in ("dots", "none"):
        return 0.0
    recomputed = [one for one in sizes.products if not one.is_last]
    flops = 2.0 * sum(one.active_size for one in recomputed) * work.tokens
    flops += (
        2.0
        * sum(one.active_adapter_size * one.outputs / (one.inputs + one.outputs) for one in recomputed)
        * (work.tokens)
    )
    if remat == "full":
        flops += sizes.mixing_flops(work) / 3
    return flops


def eight_bit_flops(sizes: Sizes, work: Work, remat: str) -> float:
    """FLOPs of products with base weights that ``model.compute`` rounds to eight bits, with rematerialization.

    Those of experts are not rounded.
    """
    total = 0.0
    for one in sizes.products:
        if one.share == 1.0:
            recomputed = remat in ("full", "attention") and not one.is_last
            total += (_passes(one) + 2.0 * recomputed) * one.size * work.tokens
    return total
