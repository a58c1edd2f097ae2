"""Quantized formats of published checkpoints, one scale per block: FP8 (DeepSeek-V3, Qwen3) and MXFP4 (GPT-OSS).

Both store a weight as two tensors, codes and scales. Values are products of a code and the scale of its block, in
float32, rounded once to bfloat16. ``modules_to_not_convert`` of the config is not read: a weight that it names has no
scales in the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from sft_jax.errors import UserError

_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_BYTES = np.arange(256, dtype=np.uint8)
# Both values of each byte, the low four bits first, in one element: a look-up for two values.
_PAIRS = np.stack([_E2M1[_BYTES & 15], _E2M1[_BYTES >> 4]], axis=-1).view(np.uint64)[:, 0]


class BlockFormat(Protocol):
    """A format: the names, dtypes and shapes of its tensors, and how to dequantize them."""

    @property
    def name(self) -> str:
        """The ``quant_method`` of the config."""
        ...

    @property
    def ends(self) -> tuple[str, str]:
        """The ends of the names of codes and scales."""
        ...

    @property
    def dtypes(self) -> tuple[str, tuple[str, ...]]:
        """The safetensors dtype of the codes, and those of scales."""
        ...

    def shapes(self, codes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The shapes of the weight and of its scales for a shape of codes; None if codes cannot have this shape."""
        ...

    def scale_rows(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the scales for the rows ``start … stop`` of the weight."""
        ...

    def factors(self, scales: np.ndarray) -> np.ndarray:
        """Scales as stored (uint8 where their dtype is one byte) in float32."""
        ...

    def dequantize(self, codes: np.ndarray, factors: np.ndarray, start: int) -> np.ndarray:
        """Rows of the weight in bfloat16.

        Args:
            codes: uint8, the rows of the codes from ``start`` on.
            factors: float32, the rows of the scales that :meth:`scale_rows` names.
        """
        ...


@dataclass(frozen=True)
class FP8:
    """E4M3 codes ``X.weight [out, in]`` and scales ``X.weight_scale_inv``, one per block of rows × columns.

    Blocks at the end may be smaller. As an example, ``[5, 6]`` in blocks of 2 × 4 has scales ``[3, 2]``, and the rows
    1 … 4 need the scales' rows 0 … 2: ``scale_rows(1, 4)`` is ``(0, 2)``.
    """

    rows: int
    columns: int
    name: str = "fp8"
    ends: tuple[str, str] = ("", "_scale_inv")
    dtypes: tuple[str, tuple[str, ...]] = ("F8_E4M3", ("F32", "BF16"))

    def shapes(self, codes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        if len(codes) != 2:
            return None
        return codes, (-(-codes[0] // self.rows), -(-codes[1] // self.columns))

    def scale_rows(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.rows, -(-stop // self.rows)

    def factors(self, scales: np.ndarray) -> np.ndarray:
        return scales.astype(np.float32)

    def dequantize(self, codes: np.ndarray, factors: np.ndarray, start: int) -> np.ndarray:
        weight = np.empty(codes.shape, ml_dtypes.bfloat16)
        first = start // self.rows * self.rows - start  # of the first block, relative to the rows that are read
        for number, of_block in enumerate(factors):
            at = slice(max(0, first + number * self.rows), first + (number + 1) * self.rows)
            values = codes[at].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            weight[at] = values * np.repeat(of_block, self.columns)[: codes.shape[1]]
        return weight


@dataclass(frozen=True)
class MXFP4:
    """E2M1 codes ``X_blocks [E, out, in/32, 16]``, two per byte, and E8M0 scales ``X_scales [E, out, in/32]``.

    The weight ``X`` is ``[E, in, out]``. As an example, the byte 0x52 holds the codes 2 and 5, in this order, with the
    values 1 and 3; the scale 128 doubles them.
    """

    name: str = "mxfp4"
    ends: tuple[str, str] = ("_blocks", "_scales")
    dtypes: tuple[str, tuple[str, ...]] = ("U8", ("U8",))

    def shapes(self, codes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        if len(codes) != 4 or codes[3] != 16:
            return None
        num_experts, out_dim, num_blocks, _ = codes
        return (num_experts, 32 * num_blocks, out_dim), codes[:3]

    def scale_rows(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def factors(self, scales: np.ndarray) -> np.ndarray:
        return scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)

    def dequantize(self, codes: np.ndarray, factors: np.ndarray, start: int) -> np.ndarray:
        num_experts, out_dim, num_blocks, _ = codes.shape
        weight = np.empty((num_experts, 32 * num_blocks, out_dim), ml_dtypes.bfloat16)
        for expert in range(num_experts):  # one by one: the float32 values of all would take twice the weight's memory
            values = _PAIRS[codes[expert]].view(np.float32) * factors[expert, :, :, None]
            # Rounded before the transpose, which is slow: it then moves half of the bytes.
            weight[expert] = values.reshape(out_dim, -1).astype(ml_dtypes.bfloat16).T
        return weight


def block_format(config: dict[str, Any]) -> BlockFormat | None:
    """The format of the weights of a ``config.json``; None if they are not quantized.

    Raises:
        UserError: a quantization that cannot be read.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "mxfp4":
        return MXFP4()
    what = f"({method or 'unknown method'})"
    if method == "fp8":
        size = settings.get("weight_block_size", [128, 128])  # transformers' default
        is_size = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        scheme = settings.get("activation_scheme", "dynamic")
        if is_size and scheme == "dynamic":
            return FP8(*size)
        what = f"(fp8 with weight_block_size {size} and activation_scheme {scheme})"
    raise UserError(
        f"quantized checkpoints {what} are not supported; those in blocks of fp8 or mxfp4 are; use the original model "
        "and set model.quantization to nf4 or int8; to load an adapter of the quantized model, pass the original with "
        "--base"
    )
