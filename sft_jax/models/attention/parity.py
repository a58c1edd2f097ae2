"""Compares an attention backend with the ``xla`` backend on the device of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.errors import UserError
from sft_jax.models.attention.spec import AttentionSpec
from sft_jax.models.attention.xla import xla_attention
from sft_jax.typing import Array, Float, Int

# Document lengths of two packed sequences: long and short documents that begin inside blocks of 64 and 128.
_DOCUMENTS = ((70, 130, 1, 55), (3, 190, 40))
_LENGTH = 256  # sequence length; the rest is padding
_KV_HEADS = 2
WINDOW = 40  # the sliding window to test; the windows of models are longer than the sequences
TOLERANCE = 0.03  # for 16 bits: rounding gives 0.009, attending to one key of another document more than 0.1

Compute = Callable[[Array, Array, Array, Array, int | None, float | None], Array]

# What jax, a kernel's library and the compiler raise where a kernel does not run. A kernel that jax cannot lower is a
# bug, which needs no GPU to be seen.
_REFUSALS = (RuntimeError, ValueError)


class Refused(UserError):
    """A backend does not run on this device; ``reason`` is the first line of what it says."""

    def __init__(self, name: str, error: Exception, fallback: str):
        self.reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        super().__init__(f"model.attention: {name} does not run here: {self.reason}; use model.attention={fallback}")


def check_parity(
    name: str,
    compute: Compute,
    group: int,
    head_dim: int,
    windows: Sequence[int | None] = (None,),
    softcap: float | None = None,
    dtype: Any = jnp.bfloat16,
    fallback: str = "xla",
) -> float:
    """Compares the values and gradients of a backend with ``xla`` in float32, on packed sequences.

    Args:
        name: name of the backend, for messages.
        compute: computes attention from queries ``[B, T, N, H]``, keys, values ``[B, T, K, H]``, segments ``[B, T]``,
            window and soft cap.
        group: number of query heads per key/value head.
        windows: sliding windows to test; None for no window.
        fallback: the backend that the error message recommends.

    Returns:
        The largest error of a position over all heads, relative to the root mean square over positions.

    Raises:
        Refused: the backend does not run.
        UserError: the error is above :data:`TOLERANCE`.
    """
    inputs, segments = _inputs(group, head_dim, dtype)
    real = (segments > 0)[..., None, None]
    worst = 0.0
    for window in windows:

        def results(compute: Compute, dtype: Any, window: int | None = window) -> tuple[Array, ...]:
            def run(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
                out, pullback = jax.vjp(lambda q, k, v: compute(q, k, v, segments, window, softcap), q, k, v)
                return out, *pullback(jnp.where(real, d_out, 0).astype(out.dtype))

            return jax.jit(run)(*(x.astype(dtype) for x in inputs))

        try:
            actual = jax.block_until_ready(results(compute, dtype))
        except _REFUSALS as error:
            raise Refused(name, error, fallback) from error
        expected = results(xla_attention, jnp.float32)
        for what, ours, reference in zip(("its output", "dq", "dk", "dv"), actual, expected, strict=True):
            error = _error(ours, reference, real)
            worst = max(worst, error)
            if not error <= TOLERANCE:  # also true for NaN
                raise UserError(
                    f"model.attention: {name} is wrong on {_kind(ours)}: {what} differs from the xla backend by "
                    f"{error:.2g} of its RMS{'' if window is None else f' with a window of {window}'}, "
                    f"and the tolerance is {TOLERANCE}; use model.attention={fallback}"
                )
    return worst


def check_compiles(name: str, compute: Compute, spec: AttentionSpec, length: int, fallback: str) -> None:
    """Compiles a backend and its gradient for one bfloat16 sequence of a layer's real size, without running it.

    Args:
        name, compute, fallback: as in :func:`check_parity`.
        length: the sequence length.

    Raises:
        Refused: it does not compile.
    """

    def run(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, ...]:
        out, pullback = jax.vjp(lambda q, k, v: compute(q, k, v, segments, spec.window, spec.softcap), q, k, v)
        return pullback(out)

    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    inputs = [jax.ShapeDtypeStruct((1, length, num, spec.padded_head_dim), jnp.bfloat16) for num in heads]
    try:
        jax.jit(run).lower(*inputs, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
    except _REFUSALS as error:
        raise Refused(name, error, fallback) from error


def _inputs(group: int, head_dim: int, dtype: Any) -> tuple[list[Float[Array, "B T _ H"]], Int[Array, "B T"]]:
    """Returns queries, keys, values and the output gradient, all exact in ``dtype``; and segments."""
    rng = np.random.default_rng(0)
    segments = np.zeros((len(_DOCUMENTS), _LENGTH), np.int32)
    for row, lengths in zip(segments, _DOCUMENTS, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    heads = (_KV_HEADS * group, _KV_HEADS, _KV_HEADS, _KV_HEADS * group)
    return [jnp.asarray(rng.normal(size=(*segments.shape, num, head_dim)), dtype) for num in heads], jnp.asarray(
        segments
    )


def _error(actual: Float[Array, "B T N H"], expected: Float[Array, "B T N H"], real: Array) -> float:
    difference = jnp.where(real, actual.astype(jnp.float32) - expected, 0)
    squares, sizes = (jnp.sum(jnp.where(real, x, 0) ** 2, axis=(2, 3)) for x in (difference, expected))
    return float(jnp.sqrt(jnp.max(squares) / (jnp.sum(sizes) / jnp.sum(real, dtype=jnp.float32))))


def _kind(x: Array) -> str:
    return next(iter(x.devices())).device_kind
