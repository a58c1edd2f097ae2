"""Roofline of a step: the largest of its compute, memory and network time, a lower bound of the step time.

Each of the three assumes that the chip does nothing else and reaches its peak (Williams, Waterman & Patterson 2009), so
a real step takes longer. Compute counts model FLOPs and rematerialization. Memory counts one read of each operand and
one write of each result of the matrix products, and the traffic of the optimizer; elementwise operations count as
fused. Network counts the bytes that a chip sends in collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_jax.models.work import Work
from sft_jax.planning.chips import Chip
from sft_jax.planning.flops import Product, eight_bit_flops, model_flops, repeated_flops
from sft_jax.planning.network import Hosts, Sent, groups_along, sent_in
from sft_jax.planning.step import AbstractStep

_FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Roofline:
    """The bounds of a step in seconds; ``sent`` and ``network_seconds`` are None where collectives were not counted."""

    model_flops: float  # per step, all devices
    flops: float  # the same plus rematerialization
    memory_bytes: float  # per device
    sent: Sent | None  # per device
    compute_seconds: float
    memory_seconds: float
    network_seconds: float | None

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds or 0.0)

    @property
    def without_overlap(self) -> float:
        """Seconds without overlap of the three: breaks the tie between two equal bounds."""
        return self.compute_seconds + self.memory_seconds + (self.network_seconds or 0.0)

    @property
    def bound(self) -> str:
        """The limiting resource: compute, memory or network."""
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
    """Computes the bounds of a step.

    Args:
        sent: bytes that a device sends per step; None if unknown.
        target_share: fraction of tokens that carry loss.
        document_length: tokens of each document.
    """
    work = step.work(target_share, document_length)
    needed = model_flops(step.network, work)
    flops = needed + repeated_flops(step.network, work, remat)
    moved = _memory_bytes(step, remat, work)
    # A chip multiplies eight bits at twice the rate.
    saved = 0.0 if step.config.model.compute is None else eight_bit_flops(step.network, work, remat) / 2
    return Roofline(
        model_flops=needed,
        flops=flops,
        memory_bytes=moved,
        sent=sent,
        compute_seconds=(flops - saved) / step.mesh.size / chip.flops,
        memory_seconds=moved / chip.hbm_bandwidth,
        network_seconds=None if sent is None else sent.seconds(chip),
    )


def _memory_bytes(step: AbstractStep, remat: str, work: Work) -> float:
    """Bytes that a device reads and writes in a step."""
    config, arch, shape = step.config, step.arch, step.mesh.shape
    num_microbatches = config.training.num_microbatches
    tensor, split = shape["tensor"], shape["fsdp"] * shape["sequence"]
    tokens = work.tokens / step.shards / shape["sequence"]  # of a device, all microbatches
    width = 2 if config.model.dtype == "bfloat16" else _FLOAT32

    # A product reads its input and weight and writes its output: in the forward pass, for the gradient of the input,
    # once more where it is rematerialized, and for the gradient of the weight.
    passes = 2 + (remat in ("full", "attention"))
    moved = 0.0
    compute = config.model.compute
    for one in step.network.products:
        width_of_product = 1 if compute is not None and one.share == 1.0 else width
        gathered = 2 if split > 1 else 1  # an all-gather writes it, then the product reads it
        moved += num_microbatches * passes * one.size / tensor * width_of_product * gathered
        moved += tokens * one.share * one.count * _ends(one, tensor) * width_of_product * (passes + one.is_trained)
        if one.is_trained:
            moved += num_microbatches * one.size / tensor * _FLOAT32 * gathered

    # lm_head is read twice for each chunk of targets, and its logits are written and read.
    vocab = split * tensor
    chunks = num_microbatches * step.loss_chunks(work.targets / work.tokens)
    moved += chunks * 2 * arch.vocab_size / vocab * arch.hidden_size * width
    moved += 2 * (work.targets / shape["data"]) * arch.vocab_size / vocab * _FLOAT32

    # The optimizer reads and writes weights and moments, and reads gradients.
    sizes = step.sizes()
    return moved + 2 * (sizes["trained"] + sizes["optimizer"]) + sizes["gradients"]


def _ends(product: Product, tensor: int) -> float:
    """Elements per token of a product's input and output on a device; one of the two is sharded over ``tensor``."""
    ends = zip((product.inputs, product.outputs), product.axes, strict=True)
    return sum(size / (1 if axis == "embed" else tensor) for size, axis in ends)


def expected_sent(step: AbstractStep, remat: str, work: Work, hosts: Hosts) -> Sent:
    """Estimates the bytes that a device sends in a step, to rank candidates before they are compiled.

    Each pass all-gathers the layers' weights over ``fsdp`` and ``sequence``. Gradients of trained weights are reduced
    over these axes and ``data``, and activations over ``tensor`` twice per layer and pass. Keys and values are
    all-gathered over ``sequence``. Hidden states of target tokens go to the vocabulary shards and back.
    """
    config, arch, shape = step.config, step.arch, step.mesh.shape
    num_microbatches = config.training.num_microbatches
    width = 2 if config.model.dtype == "bfloat16" else _FLOAT32
    stored = {"int8": 1.03, "nf4": 0.52}.get(config.model.quantization or "", width)  # bytes per weight
    stored = stored if config.model.compute is None else 1.0
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
        ("all-gather", num_microbatches * passes * weights * stored, along_split),
        ("reduce-scatter", num_microbatches * trained * _FLOAT32, along_split),
        ("all-reduce", num_microbatches * trained * _FLOAT32 / split, ("data",)),
        ("all-reduce", 2 * passes * arch.num_layers * tokens * arch.hidden_size * width, ("tensor",)),
        ("all-gather", passes * tokens * sequence * keys_and_values * width, ("sequence",)),
        ("all-gather", targets * arch.hidden_size * (width + _FLOAT32), along_split),
    )
    sent = (sent_in(kind, whole, groups_along(axes, step.mesh), hosts) for kind, whole, axes in collectives)
    return sum(sent, Sent())
