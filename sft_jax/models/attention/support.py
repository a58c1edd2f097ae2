"""Which requests the kernels support. Apart from the kernels, whose libraries take a while to import."""

from __future__ import annotations

from sft_jax.models.attention.spec import Request

LENGTH_MULTIPLE = 64  # of triton: the sequence length is a multiple of it, as of the tiles


def splash(request: Request) -> str | None:
    """Returns why splash attention does not support a request; None if it does."""
    return "needs a TPU" if request.device.platform != "tpu" else request.unsupported_length(128)


def triton(request: Request) -> str | None:
    """Returns why the Pallas Triton kernel does not support a request; None if it does."""
    if reason := request.unsupported_for_16_bits():
        return reason
    if (head_dim := request.spec.padded_head_dim) not in (16, 32, 64, 128):
        return f"needs a head dimension of 16, 32, 64 or 128, not {head_dim}"
    if request.parts > 1:
        return "needs whole sequences, and mesh.sequence splits them"
    return request.unsupported_length(LENGTH_MULTIPLE)


def cudnn(request: Request) -> str | None:
    """Returns why cuDNN does not support a request; None if it does."""
    if reason := request.unsupported_for_16_bits():
        return reason
    head_dim = request.spec.padded_head_dim
    if head_dim % 8 or head_dim > 128:
        return f"needs a head dimension up to 128, a multiple of 8, not {head_dim}"
    if request.spec.sinks:
        return "has no attention sinks"
    return "has no soft cap" if request.spec.softcap is not None else request.unsupported_length(2)
