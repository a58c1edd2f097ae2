"""Model FLOPs: what a step has to compute, whatever it does compute."""

from __future__ import annotations

from dataclasses import dataclass

from sft_jax.architecture import Architecture
from sft_jax.config import LoraConfig


@dataclass(frozen=True)
class Work:
    """What a step, or a second of steps, trains on."""

    tokens: float  # real ones, without padding
    targets: float  # of these, with loss
    squares: float  # sum over documents of their squared lengths


@dataclass(frozen=True)
class Product:
    """A linear layer, the same in every decoder layer: ``[inputs, outputs]``, with an adapter of ``rank`` or none."""

    name: str
    inputs: int
    outputs: int
    rank: int = 0

    @property
    def size(self) -> int:
        return self.inputs * self.outputs

    @property
    def adapter_size(self) -> int:
        return self.rank * (self.inputs + self.outputs)


def products(arch: Architecture, lora: LoraConfig | None) -> list[Product]:
    """The linear layers of a decoder layer, with the adapters that ``lora`` puts on them."""
    d, f = arch.hidden_size, arch.intermediate_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes = {
        "layers.self_attn.q_proj": (d, q),
        "layers.self_attn.k_proj": (d, kv),
        "layers.self_attn.v_proj": (d, kv),
        "layers.self_attn.o_proj": (q, d),
        "layers.mlp.gate_proj": (d, f),
        "layers.mlp.up_proj": (d, f),
        "layers.mlp.down_proj": (f, d),
    }

    def rank(name: str) -> int:
        if lora is None:
            return 0
        named = lora.target_modules == "all-linear" or any(
            f".{name}".endswith(f".{one}") for one in lora.target_modules
        )
        return lora.rank if named else 0

    return [Product(name, *shape, rank(name)) for name, shape in shapes.items()]


def model_flops(arch: Architecture, work: Work, lora: LoraConfig | None, trains_tables: bool = False) -> float:
    """Floating-point operations of forward and backward pass; a multiplication and an addition are two.

    A weight costs 2 a token forward, 2 for the gradient to its input and, if it is trained, 2 for its own: 4 a token
    where it is frozen, 6 where it is trained. The output head sees target tokens only. Attention is causal and stays
    within documents: two products of ``len² / 2`` scores forward and four backward, ``6 · len² · N · H`` a layer; a
    sliding window counts as none. Norms, rotations, softmax, the token table and whatever is computed twice count as
    nothing.

    Args:
        lora: adapters beside a frozen base; None for full fine-tuning.
        trains_tables: whether the output head is trained all the same.

    >>> one = Architecture("llama", 100, 8, 16, 1, 2, 1, 4, 1e-5, None, True)
    >>> model_flops(one, Work(tokens=10, targets=0, squares=0), None)  # 6 · 10 · (8·8 + 2·8·4 + 8·8 + 3·8·16)
    34560.0
    """
    layers = products(arch, lora)
    weights = arch.num_layers * sum(one.size for one in layers)
    adapters = arch.num_layers * sum(one.adapter_size for one in layers)
    of_base = 6.0 if lora is None else 4.0
    of_head = 6.0 if trains_tables else of_base
    head = of_head * arch.vocab_size * arch.hidden_size * work.targets
    return (of_base * weights + 6.0 * adapters) * work.tokens + head + _attention(arch, work)


def repeated_flops(arch: Architecture, work: Work, lora: LoraConfig | None, remat: str) -> float:
    """What is computed a second time for the backward pass, beyond :func:`model_flops`: a forward pass of the layers.

    Not its last product, which no gradient needs. ``attention`` keeps what attention and adapters' first products give,
    and only products with the base's weights are made again; ``dots`` and ``none`` repeat no product.
    """
    if remat in ("dots", "none"):
        return 0.0
    layers = products(arch, lora)[:-1]
    flops = 2.0 * arch.num_layers * sum(one.size for one in layers) * work.tokens
    if remat == "full":
        flops += 2.0 * arch.num_layers * sum(one.adapter_size for one in layers) * work.tokens
        flops += _attention(arch, work) / 3
    return flops


def _attention(arch: Architecture, work: Work) -> float:
    return 6.0 * work.squares * arch.num_heads * arch.head_dim * arch.num_layers
