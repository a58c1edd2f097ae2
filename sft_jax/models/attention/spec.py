"""The spec of an attention layer, and a request to a backend. Does not import jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class AttentionSpec:
    """The parameters of grouped-query attention that a backend needs.

    Attributes:
        scale: multiplies the products of queries and keys; None for ``1 / √head_dim``.
        window: position t attends to s only if ``t - s < window``; None for no window.
        softcap: ``c`` of the soft cap; scores become ``c · tanh(score / c)``; None for no cap.
        sinks: whether each query head has one more score, a parameter, for a key whose value is zero.
        chunk: position t attends to s only if ``t // chunk == s // chunk``, counted within their document, as in
            Llama 4; None for no chunks.
        v_head_dim: the head dimension of values; None for that of queries and keys.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    chunk: int | None = None
    v_head_dim: int | None = None

    is_mixer: ClassVar[bool] = True  # mixes tokens, and returns cache entries besides its output

    @property
    def group(self) -> int:
        """Returns the number of query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_head_dim(self) -> int:
        """Returns the head dimension of a kernel with one for queries, keys and values."""
        return max(self.head_dim, self.v_head_dim or 0)

    @property
    def is_local(self) -> bool:
        """Returns whether a window or chunks bound how far back a position attends."""
        return self.window is not None or self.chunk is not None


@dataclass(frozen=True)
class Request:
    """A request to compute an attention layer on a device.

    Attributes:
        device: a device that the step is compiled for; may be a device of a topology.
        dtype: dtype of queries, keys and values.
        length: the sequence length; for several lengths, their greatest common divisor.
        parts: the number of shards of a sequence along ``mesh.sequence``.
    """

    device: Any
    spec: AttentionSpec
    dtype: str
    length: int
    parts: int = 1

    def unsupported_length(self, multiple: int) -> str | None:
        """Returns an error if the length of each shard is not a multiple of ``multiple``; else None."""
        if self.length % (multiple * self.parts) == 0:
            return None
        where = "data.max_length" if self.parts == 1 else f"data.max_length, in {self.parts} shards by mesh.sequence"
        return f"needs sequences of a multiple of {multiple * self.parts} tokens, not {self.length} ({where})"

    def unsupported_for_16_bits(self) -> str | None:
        """Returns why a fused kernel for the 16-bit tensor cores of NVIDIA GPUs cannot run; None if it can."""
        if self.device.platform != "gpu":
            return "needs an NVIDIA GPU"
        if (capability := self._capability()) is None or capability < 8.0:
            return "needs compute capability 8.0"
        return None if self.dtype == "bfloat16" else "needs bfloat16 (model.dtype)"

    def _capability(self) -> float | None:
        """Returns the CUDA compute capability; None for other GPUs and for devices of a topology."""
        try:
            return float(getattr(self.device, "compute_capability", ""))
        except ValueError:
            return None
