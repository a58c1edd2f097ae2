"""The gated delta rule (Yang et al. 2024, https://arxiv.org/abs/2412.06464), in chunked parallel form.

Per head, a state ``S [K, V]`` maps keys to values. Each token decays it, corrects what it returns for the token's key,
and reads it with the query::

    S ← exp(log_decay) · S;    S ← S + β · k ⊗ (v - Sᵀk);    out = Sᵀq

Within a chunk of C tokens, all corrections are the solution of one triangular system, so that only the state is passed
from chunk to chunk. With the corrections ``u`` and the decay ``d[t, s] = exp(Σ_{s<r≤t} log_decay[r])``::

    (I + A) u = β · (v - d[t, -1] · Sᵀk),    A[t, s] = β[t] · d[t, s] · k[t]·k[s]  for s < t
    out[t] = d[t, -1] · Sᵀq[t] + Σ_{s≤t} d[t, s] · q[t]·k[s] · u[s]

Each segment starts with a state of zeros: ``d`` is zero between segments, also from one chunk to the next.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sft_jax.models.recurrent.triangular import unit_lower_inverse
from sft_jax.models.remat import ATTENTION, checkpoint_name
from sft_jax.typing import Array, Float, Int

# The backward pass computes this many chunks at once, from the state before them.
_GROUP = 16


def gated_delta(
    q: Float[Array, "B T M K"],
    k: Float[Array, "B T M K"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"],
    chunk: int = 64,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """Returns the outputs in the dtype of ``v``, and the float32 state after the last segment of each row.

    Computes in float32. Its products have the default precision of the device if ``v`` has 16 bits, and are exact
    otherwise. Padding (segment 0) is at the end of a row and leaves the state as it is. Memory for the backward pass
    grows with T: a state for each group of chunks, and the intermediate values of one group.

    Example: with K = V = 1, no decay, ``β = ½``, q = k = 1, v = 4 and segments ``1 1 2``, the states are 2, 3, 2.

    Args:
        q, k: M divides N; consecutive N/M heads of ``v`` share one. Callers scale and normalize them.
        log_decay: at most 0.
        chunk: a power of two.
    """
    batch, length, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    chunk = min(chunk, 1 << (length - 1).bit_length())
    chunks = -(-length // chunk)
    groups = -(-chunks // _GROUP)
    chunks = -(-chunks // groups)  # in each group

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, groups * chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)])

    def split(x: Array) -> Array:
        """``[B, T, N or M, X]`` → ``[groups, chunks, B, M, G, C, X]``."""
        x = pad(x).reshape(batch, groups, chunks, chunk, key_heads, x.shape[2] // key_heads, -1)
        return x.transpose(1, 2, 0, 4, 5, 3, 6)

    real = (segment_ids > 0)[..., None]
    log_decay, beta = (jnp.where(real, x.astype(jnp.float32), 0.0) for x in (log_decay, beta))
    numbers = _numbers(pad(segment_ids)).reshape(batch, groups * chunks, chunk)
    before = jnp.pad(numbers[:, :-1, -1], [(0, 0), (1, 0)]).reshape(batch, groups, chunks)
    numbers = numbers.reshape(batch, groups, chunks, chunk)
    numbers, before = (jnp.moveaxis(x, 0, 2) for x in (numbers, before))

    precision = None if jnp.finfo(v.dtype).bits == 16 else lax.Precision.HIGHEST
    group = jax.checkpoint(partial(_group, precision=precision), prevent_cse=False)
    state = jnp.zeros((batch, key_heads, heads // key_heads, key_dim, value_dim), jnp.float32)
    state, out = lax.scan(group, state, (*map(split, (q, k, v, log_decay, beta)), numbers, before))
    out = out.transpose(2, 0, 1, 5, 3, 4, 6).reshape(batch, -1, heads, value_dim)
    return checkpoint_name(out[:, :length], ATTENTION), state.reshape(batch, heads, key_dim, value_dim)


def gated_delta_step(
    q: Float[Array, "B M K"],
    k: Float[Array, "B M K"],
    v: Float[Array, "B N V"],
    log_decay: Float[Array, "B N"],
    beta: Float[Array, "B N"],
    state: Float[Array, "B N K V"],
) -> tuple[Float[Array, "B N V"], Float[Array, "B N K V"]]:
    """Computes one token of :func:`gated_delta`; returns the output in the dtype of ``v``, and the next state."""
    repeats = v.shape[1] // k.shape[1]
    q, k = (jnp.repeat(x.astype(jnp.float32), repeats, axis=1) for x in (q, k))
    log_decay, beta = log_decay.astype(jnp.float32), beta.astype(jnp.float32)
    # Products with one vector are bound by reading the state: multiply and sum exactly.
    state = state * jnp.exp(log_decay)[..., None, None]
    error = v.astype(jnp.float32) - jnp.sum(state * k[..., None], axis=-2)
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return jnp.sum(state * q[..., None], axis=-2).astype(v.dtype), state


def _numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the number of segments up to each token; ``1 1 5 5 0`` → ``1 1 2 2 2``."""
    before = jnp.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
    return jnp.cumsum((segment_ids > 0) & (segment_ids != before), axis=1, dtype=jnp.int32)


def _group(state: Float[Array, "B M G K V"], inputs: Any, precision: Any) -> tuple[Array, Array]:
    """Computes a group of chunks; all but the states for all chunks in parallel. G = N/M.

    Args:
        state: before the group.
        inputs: q, k ``[chunks, B, M, 1, C, K]``; v ``[…, G, C, V]``; log_decay, beta ``[…, G, C, 1]``; the number of
            each token's segment ``[chunks, B, C]`` and of the segment before the chunk ``[chunks, B]``.

    Returns:
        The state after the group, and outputs ``[chunks, B, M, G, C, V]``.
    """
    state = checkpoint_name(state, ATTENTION)
    q, k, v, log_decay, beta, numbers, before = inputs
    q, k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    product = partial(jnp.einsum, precision=precision)
    decay, carried = _decays(log_decay[..., 0], numbers, before)
    chunk = decay.shape[-1]

    system = jnp.where(np.tri(chunk, k=-1, dtype=bool), beta * decay * product("...tk,...sk->...ts", k, k), 0.0)
    inverse = unit_lower_inverse(system)
    of_values = product("...ts,...sv->...tv", inverse, beta * wide_v)
    of_state = product("...ts,...sk->...tk", inverse, beta * carried[..., None] * k)
    last_k = decay[..., -1, :, None] * k
    last_carried = carried[..., -1, None, None]

    def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        of_values, of_state, last_k, last_carried = inputs
        u = of_values - product("...tk,...kv->...tv", of_state, state)
        return last_carried * state + product("...tk,...tv->...kv", last_k, u), (state, u)

    state, (states, u) = lax.scan(step, state, (of_values, of_state, last_k, last_carried))
    out = product("...tk,...kv->...tv", carried[..., None] * q, states)
    out += product("...ts,...sv->...tv", decay * product("...tk,...sk->...ts", q, k), u)
    return state, out.astype(v.dtype)


def _decays(
    log_decay: Float[Array, "chunks B M G C"], numbers: Int[Array, "chunks B C"], before: Int[Array, "chunks B"]
) -> tuple[Float[Array, "chunks B M G C C"], Float[Array, "chunks B M G C"]]:
    """Returns the decay from each token to each later one of its segment, and from the state before the chunk.

    Each exponent is a sum of its own. A difference of two cumulative sums would lose the digits of a small exponent
    after a token with a large one. No exponent is positive, so nothing overflows, also where it is masked.
    """
    chunk = log_decay.shape[-1]
    t, r, s = np.ogrid[:chunk, :chunk, :chunk]
    between = jnp.asarray((s < r) & (r <= t), jnp.float32)
    exact = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    decay = jnp.exp(exact("...r,trs->...ts", log_decay, between))
    visible = (numbers[..., :, None] == numbers[..., None, :]) & np.tri(chunk, dtype=bool)
    carried = jnp.exp(exact("...r,tr->...t", log_decay, jnp.asarray(np.tri(chunk), jnp.float32)))
    is_carried = numbers == before[..., None]
    return jnp.where(visible[:, :, None, None], decay, 0.0), jnp.where(is_carried[:, :, None, None], carried, 0.0)
