"""Reads the weights of a quantized checkpoint as if they were stored in bfloat16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.block_formats import BlockFormat
from sft_jax.hf.config import read_format
from sft_jax.hf.hub import weights_of
from sft_jax.hf.reader import DTYPES, Reader, TensorReader


def open_weights(folder: Path) -> Reader:
    """Opens the weights of a model, which may be quantized.

    Args:
        folder: from :func:`sft_jax.hf.hub.find_model`.

    Raises:
        UserError: the files are damaged, or quantized in a way that cannot be read.
    """
    fmt, reader = read_format(folder), TensorReader(weights_of(folder))
    return reader if fmt is None else DequantizedReader(reader, fmt)


class DequantizedReader:
    """Reads the tensors of a quantized checkpoint by name, dequantized to bfloat16 by ranges of rows.

    Codes and scales of a weight appear as one tensor with the name and shape of the weight. Tensors that are not
    quantized are read as they are.

    Raises:
        UserError: codes without scales, scales without codes, or scales of another shape or dtype.
    """

    def __init__(self, reader: TensorReader, fmt: BlockFormat):
        self._reader, self._fmt = reader, fmt
        self._codes: dict[str, str] = {}  # names of the codes by the name of the weight
        self._shapes: dict[str, tuple[int, ...]] = {}
        codes_end, scales_end = fmt.ends
        for name in sorted(reader.names):
            if reader.code(name) == fmt.dtypes[0] and name.endswith(codes_end):
                weight = name.removesuffix(codes_end)
                self._shapes[weight] = self._checked(weight, name)
                self._codes[weight] = name
        scales = {self._scales(weight) for weight in self._codes}
        for name in sorted(reader.names - scales):
            if name.endswith(scales_end):
                codes = name.removesuffix(scales_end) + codes_end
                raise self._error(name, f"has no tensor {codes} of dtype {fmt.dtypes[0]} beside it")
        self._coded = scales | set(self._codes.values())
        self._names = (reader.names - self._coded) | set(self._codes)

    @property
    def folder(self) -> Path | str:
        """The location of the files."""
        return self._reader.folder

    @property
    def names(self) -> set[str]:
        """Names of weights, not those of codes and scales."""
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return self._shapes[name] if name in self._codes else self._reader.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a weight: bfloat16 if it is quantized.

        Raises:
            UserError: a dtype that neither weights nor buffers have.
        """
        return np.dtype(ml_dtypes.bfloat16) if name in self._codes else self._reader.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads the rows ``start … stop`` of a weight's first dimension, by default all.

        Raises:
            UserError: the file is truncated, or a scale is not finite.
        """
        if name not in self._codes:
            return self._reader.read(name, start, stop)
        start, stop, _ = slice(start, stop).indices(self.shape(name)[0])
        codes = self._reader.read_codes(self._codes[name], start, stop)
        factors = self._factors(self._scales(name), *self._fmt.scale_rows(start, stop))
        with np.errstate(over="ignore"):  # loading checks that weights are finite
            return self._fmt.dequantize(codes, factors, start)

    def fingerprint(self) -> str:
        """The fingerprint of the stored tensors, see :meth:`TensorReader.fingerprint`."""
        return self._reader.fingerprint(self._coded)

    def _scales(self, weight: str) -> str:
        return weight + self._fmt.ends[1]

    def _checked(self, weight: str, codes: str) -> tuple[int, ...]:
        """Checks the tensors of a weight, and returns the weight's shape."""
        reader, scales = self._reader, self._scales(weight)
        shapes = self._fmt.shapes(reader.shape(codes))
        if shapes is None:
            raise self._error(codes, f"has shape {reader.shape(codes)}, but this is no shape of {self._fmt.name} codes")
        if scales not in reader.names:
            raise self._error(scales, f"is missing; it has the scales of {codes}")
        if reader.shape(scales) != shapes[1]:
            raise self._error(scales, f"has shape {reader.shape(scales)}, but {codes} implies {shapes[1]}")
        allowed = self._fmt.dtypes[1]
        if reader.code(scales) not in allowed:
            raise self._error(scales, f"has dtype {reader.code(scales)}; supported are {', '.join(allowed)}")
        if weight != codes and weight in reader.names:
            raise self._error(weight, f"is stored twice, also as {codes}")
        return shapes[0]

    def _factors(self, name: str, start: int, stop: int) -> np.ndarray:
        read = self._reader.read if self._reader.code(name) in DTYPES else self._reader.read_codes
        factors = self._fmt.factors(read(name, start, stop))
        if not np.isfinite(factors).all():
            raise self._error(name, "has scales that are not finite (NaN or infinite); the checkpoint is corrupt")
        return factors

    def _error(self, name: str, what: str) -> UserError:
        return UserError(f"{self.folder}: tensor {name} {what}")
