"""The time that a step cannot be faster than: the slowest of computing, of memory and of the network.

Each of the three is taken as if it had the chip to itself and reached its peak (Williams, Waterman & Patterson 2009),
so a real step takes longer. Counted are the model's FLOPs and what rematerialisation repeats; what matrix products read
and write, once each, and what the optimizer reads and writes; what a chip sends in collectives. Elementwise operations
count as fused into the products.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_jax.planning.chips import Chip
from sft_jax.planning.flops import Product, Work, model_flops, repeated_flops
from sft_jax.planning.network import Hosts, Sent, groups_along, sent_in
from sft_jax.planning.step import AbstractStep

_WIDE = 4  # bytes of float32


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step, and of each of its bounds; None where what is sent was not counted."""

    model_flops: float  # of a step, all devices
    flops: float  # the same with what is computed twice
    memory_bytes: float  # of a device
    sent: Sent | None  # by a device
    compute_seconds: float
    memory_seconds: float
    network_seconds: float | None

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds or 0.0)

    @property
    def in_turn(self) -> float:
        """Seconds if nothing of the three overlapped: of two equal bounds, the less of this the better."""
        return self.compute_seconds + self.memory_seconds + (self.network_seconds or 0.0)

    @property
    def bound(self) -> str:
        """compute, memory or network."""
        named = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "network": self.network_seconds or 0.0,
        }
        return max(named, key=lambda name: named[name])


def roofline(
    step: AbstractStep,
    remat: str,
    chip: Chip,
    sent: Sent | None,
    target_share: float,
    document_length: int,
) -> Roofline:
    """The bounds of a step.

    Args:
        sent: by a device in a step; None if that is not known.
        target_share: of positions that carry loss.
        document_length: slots of each document.
    """
    work = step.work(target_share, document_length)
    needed = model_flops(step.network, work)
    flops = needed + repeated_flops(step.network, work, remat)
    moved = _memory_bytes(step, remat, work)
    return Roofline(
        model_flops=needed,
        flops=flops,
        memory_bytes=moved,
        sent=sent,
        compute_seconds=flops / step.mesh.size / chip.flops,
        memory_seconds=moved / chip.hbm_bandwidth,
        network_seconds=None if sent is None else sent.seconds(chip),
    )


def _memory_bytes(step: AbstractStep, remat: str, work: Work) -> float:
    """What a device reads and writes in a step."""
    config, arch, shape = step.config, step.arch, step.mesh.shape
    parts = config.training.num_microbatches
    tensor, split = shape["tensor"], shape["fsdp"] * shape["sequence"]
    tokens = work.tokens / step.shards / shape["sequence"]  # of a device, all parts together
    width = 2 if config.model.dtype == "bfloat16" else _WIDE

    # A product reads its input and its weights and writes its output: forward, for the gradient to its input, again
    # where it is rematerialised, and for the weight's own gradient.
    passes = 2 + (remat in ("full", "attention"))
    moved = 0.0
    for one in step.network.products:
        gathered = 2 if split > 1 else 1  # written when it arrives, then read
        moved += parts * passes * one.size / tensor * width * gathered
        moved += tokens * one.share * one.count * _ends(one, tensor) * width * (passes + one.is_trained)
        if one.is_trained:
            moved += parts * one.size / tensor * _WIDE * gathered

    # The head is read twice for each chunk of targets, and its logits are written and read.
    vocab = split * tensor
    chunks = parts * step.loss_chunks(work.targets / work.tokens)
    moved += chunks * 2 * arch.vocab_size / vocab * arch.hidden_size * width
    moved += 2 * (work.targets / shape["data"]) * arch.vocab_size / vocab * _WIDE

    # The optimizer reads and writes weights and moments and reads gradients.
    sizes = step.sizes()
    return moved + 2 * (sizes["trained"] + sizes["optimizer"]) + sizes["gradients"]


def _ends(product: Product, tensor: int) -> float:
    """Input and output of a product on a device, in elements a token: one of the two is split over ``tensor``."""
    ends = zip((product.inputs, product.outputs), product.axes, strict=True)
    return sum(size / (1 if axis == "embed" else tensor) for size, axis in ends)


def expected_sent(step: AbstractStep, remat: str, work: Work, hosts: Hosts) -> Sent:
    """What a device sends in a step, by formula: an estimate, for choosing what to compile.

    Weights of layers are gathered over ``fsdp`` and ``sequence`` for each pass, gradients of trained ones are summed
    over these and ``data``, activations over ``tensor`` twice a layer and pass, keys and values are gathered over
    ``sequence``, and the hidden states of targets travel to the parts of the vocabulary and back.
    """
    config, arch, shape = step.config, step.arch, step.mesh.shape
    parts = config.training.num_microbatches
    width = 2 if config.model.dtype == "bfloat16" else _WIDE
    kept = {"int8": 1.03, "nf4": 0.52}.get(config.model.quantization or "", width)
    sequence, tensor = shape["sequence"], shape["tensor"]
    split = shape["fsdp"] * sequence
    layers = step.network.products
    passes = 2 + (remat in ("full", "attention"))
    weights = sum(one.size for one in layers) / tensor
    trained = sum(one.size * one.is_trained + one.count * one.adapter_size for one in layers) / tensor
    tokens = work.tokens / step.shards / sequence
    keys_and_values = sum(one.count * one.outputs for one in layers if one.axes[1] == "kv_heads") / tensor
    targets = work.targets / shape["data"]
    along_split = ("fsdp", "sequence")
    collectives = (
        ("all-gather", parts * passes * weights * kept, along_split),
        ("reduce-scatter", parts * trained * _WIDE, along_split),
        ("all-reduce", parts * trained * _WIDE / split, ("data",)),
        ("all-reduce", 2 * passes * arch.num_layers * tokens * arch.hidden_size * width, ("tensor",)),
        ("all-gather", passes * tokens * sequence * keys_and_values * width, ("sequence",)),
        ("all-gather", targets * arch.hidden_size * (width + _WIDE), along_split),
    )
    found = (sent_in(kind, whole, groups_along(axes, step.mesh), hosts) for kind, whole, axes in collectives)
    return sum(found, Sent())
