"""Model FLOPs: what a step has to compute, whatever it does compute. The modules of the network are asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx

from sft_jax.models.layers import Projection
from sft_jax.models.split import FROZEN, Split
from sft_jax.tree import flatten


@dataclass(frozen=True)
class Work:
    """What a step, or a second of steps, trains on."""

    tokens: float  # real ones, without padding
    targets: float  # of these, with loss
    squares: float  # sum over documents of their squared lengths


@dataclass(frozen=True)
class Product:
    """A linear layer ``[inputs, outputs]`` and its like in other decoder layers.

    Attributes:
        name: of the module.
        axes: the logical axes of inputs and outputs.
        count: how many of them there are.
        share: of all tokens that one of them multiplies; less than 1 for an expert.
        adapter_size: parameters of the adapter of one; 0 where it has none.
        is_trained: whether the weights themselves are.
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
        """Weights of all of them."""
        return self.count * self.inputs * self.outputs

    @property
    def used(self) -> float:
        """Weights that a token meets."""
        return self.size * self.share

    @property
    def used_of_adapter(self) -> float:
        """Parameters of adapters that a token meets."""
        return self.count * self.adapter_size * self.share

    @property
    def is_last(self) -> bool:
        """Whether no gradient needs its result, because it is the last of a layer."""
        return self.axes[0] == "mlp"


@dataclass(frozen=True)
class Sizes:
    """What a network multiplies."""

    products: tuple[Product, ...]  # of decoder layers
    head: Product
    mixers: tuple[tuple[int, Any], ...]  # how many layers, and the spec of what mixes tokens in them

    @classmethod
    def of(cls, split: Split) -> Sizes:
        """Those of a network without values."""
        model = split.abstract()
        products, mixers = [], []
        for path, node in nnx.iter_graph(model.layers):
            name = ".".join(map(str, ("layers", *path)))
            if isinstance(node, Projection):
                products.append(_product(name, node, split))
            elif hasattr(node, "mixing_flops"):
                mixers.append((len(split.layers(("layers", *map(str, path)))), node))
        if model.lm_head is not None:
            return cls(tuple(products), _product("lm_head", model.lm_head, split), tuple(mixers))
        vocab, dim = model.embed_tokens.weight.shape
        is_trained = split.labels.get(("embed_tokens", "weight"), FROZEN) != FROZEN
        return cls(
            tuple(products), Product("lm_head", dim, vocab, ("embed", "vocab"), is_trained=is_trained), tuple(mixers)
        )

    def mixing_flops(self, squares: float) -> float:
        """Of scores and their products with values, forward and backward."""
        return sum(count * module.mixing_flops(squares) for count, module in self.mixers)


def _product(name: str, module: Projection, split: Split) -> Product:
    *stack, inputs, outputs = module.weight.shape
    count = 1
    for size in stack:
        count *= size
    leaves, path = flatten(split.trainable), tuple(name.split("."))
    adapter = sum(leaf.size for at, leaf in split.adapter().items() if at[:-1] == path)
    return Product(
        name, inputs, outputs, module.axes, count, module.share, adapter // count, (*path, "weight") in leaves
    )


def model_flops(sizes: Sizes, work: Work) -> float:
    """Floating-point operations of forward and backward pass; a multiplication and an addition are two.

    A weight costs 2 a token forward, 2 for the gradient to its input and, if it is trained, 2 for its own: 4 a token
    where it is frozen, 6 where it is trained; of experts, those count that a token meets. ``lm_head`` sees target
    tokens only. Attention is causal and stays within documents: two products of ``len² / 2`` scores forward and four
    backward, ``6 · len² · N · H`` a layer; a sliding window counts as none. Norms, rotations, softmax, embeddings and
    whatever is computed twice count as nothing.
    """
    layers = sum(_passes(one) * one.used + 6.0 * one.used_of_adapter for one in sizes.products)
    head = _passes(sizes.head) * sizes.head.size * work.targets
    return layers * work.tokens + head + sizes.mixing_flops(work.squares)


def _passes(product: Product) -> float:
    return 6.0 if product.is_trained else 4.0


def repeated_flops(sizes: Sizes, work: Work, remat: str) -> float:
    """What is computed a second time for the backward pass, beyond :func:`model_flops`: a forward pass of the layers.

    Not its last product, which no gradient needs. ``attention`` keeps what attention and adapters' first products give,
    and only products with the base's weights are made again; ``dots`` and ``none`` repeat no product.
    """
    if remat in ("dots", "none"):
        return 0.0
    again = [one for one in sizes.products if not one.is_last]
    flops = 2.0 * sum(one.used for one in again) * work.tokens
    if remat == "full":
        flops += 2.0 * sum(one.used_of_adapter for one in again) * work.tokens
        flops += sizes.mixing_flops(work.squares) / 3
    return flops
