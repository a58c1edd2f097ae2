"""What an attention layer computes, and what is asked of a backend for it. No jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionSpec:
    """Scores of grouped queries, and which positions a query sees: what a backend has to know of a layer.

    Attributes:
        scale: of the products of queries and keys; None for ``1 / √head_dim``.
        window: position t sees s only if ``t - s < window``; None for all positions before.
        softcap: scores become ``c · tanh(score / c)``; None for no cap.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Request:
    """What a backend is asked to compute.

    Attributes:
        device: that the step is compiled for; it need not be there.
        dtype: of queries, keys and values.
        length: of a sequence; where there are several, what divides them all.
        parts: in how many parts ``mesh.sequence`` splits a sequence.
    """

    device: Any
    spec: AttentionSpec
    dtype: str
    length: int
    parts: int = 1

    def obstacle_of_length(self, multiple: int) -> str | None:
        """Why the sequences do not fit, where each part has to be a multiple of this."""
        if self.length % (multiple * self.parts) == 0:
            return None
        where = "data.max_length" if self.parts == 1 else f"data.max_length, in {self.parts} parts by mesh.sequence"
        return f"needs sequences of a multiple of {multiple * self.parts} tokens, not {self.length} ({where})"

    def obstacle_of_16_bits(self) -> str | None:
        """Why a fused kernel for 16-bit tensor cores of NVIDIA GPUs cannot run."""
        if self.device.platform != "gpu":
            return "needs an NVIDIA GPU"
        if (capability := self._capability()) is None or capability < 8.0:
            return "needs compute capability 8.0"
        return None if self.dtype == "bfloat16" else "needs bfloat16 (model.dtype)"

    def _capability(self) -> float | None:
        """The CUDA compute capability; None for other GPUs, and for devices that are only compiled for."""
        try:
            return float(getattr(self.device, "compute_capability", ""))
        except ValueError:
            return None
