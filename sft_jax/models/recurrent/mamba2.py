"""The Mamba-2 mixer (Dao & Gu 2024): a gated linear recurrence behind a short convolution."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.architecture import Norm
from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear
from sft_jax.models.mlp import ACTIVATIONS
from sft_jax.models.recurrent.conv import DepthwiseConv
from sft_jax.models.recurrent.gated_norm import GatedNorm
from sft_jax.models.recurrent.ssd import ssd, ssd_step
from sft_jax.models.recurrent.state import RecurrentState
from sft_jax.models.recurrent.whole import whole_sequences
from sft_jax.models.remat import PRODUCT, checkpoint_name
from sft_jax.models.work import Work
from sft_jax.typing import Array, Float


@dataclass(frozen=True)
class Mamba2Spec:
    """``out_proj(norm(recurrence(activation(conv(x))), gate))``, with all inputs from ``in_proj``.

    Attributes:
        num_heads, head_dim: of the recurrence.
        num_groups: of heads that share ``b`` and ``c``.
        state_size: rows of a head's memory.
        norm: of the recurrence's output, an RMS norm in each group; None for no norm.
        norm_before_gate: whether the output is normalized before it is multiplied by ``silu(gate)``, not after.
        conv_size: taps of the convolution.
        activation: of the convolution, in :data:`~sft_jax.models.mlp.ACTIVATIONS`.
        time_step_limit: least and greatest time step.
        scales: multiply the parts of ``in_proj``'s output: gate, x, b, c, time step.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    norm: Norm | None
    norm_before_gate: bool = False
    conv_size: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    activation: str = "silu"
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    is_mixer: ClassVar[bool] = True

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """The sizes of the parts of ``in_proj``'s output: gate, x, b, c, time step."""
        shared = self.num_groups * self.state_size
        return self.inner_size, self.inner_size, shared, shared, self.num_heads

    def module(self, dim: int, make: Initializer, stack: tuple[int, ...]) -> Mamba2:
        return Mamba2(self, dim, make, stack)


class Mamba2(nnx.Module):
    """The module of :class:`Mamba2Spec`."""

    def __init__(self, spec: Mamba2Spec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec = spec
        self.in_proj = Linear(dim, sum(spec.parts), ("embed", "heads"), make, stack, spec.in_bias)
        self.conv1d = DepthwiseConv(sum(spec.parts[1:4]), spec.conv_size, spec.conv_bias, make, stack)
        self.out_proj = Linear(spec.inner_size, dim, ("heads", "embed"), make, stack, spec.out_bias)
        # As in the paper, time steps from 0.001 to 0.1 and decay rates from 1 to 16, spread over the heads.
        index = jnp.arange(spec.num_heads)
        steps = jnp.logspace(-3.0, -1.0, spec.num_heads)
        self.dt_bias = make.repeat(jnp.log(jnp.expm1(steps)), stack, ("heads",))
        self.A_log = make.repeat(jnp.log(1.0 + (index % 16).astype(jnp.float32)), stack, ("heads",))
        self.D = make.constant(1.0, (*stack, spec.num_heads), ("heads",))
        self.norm: GatedNorm | None = nnx.data(
            None
            if spec.norm is None
            else GatedNorm(spec.inner_size, spec.norm.eps, make, stack, spec.num_groups, spec.norm_before_gate)
        )

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], RecurrentState]:
        """Returns the output, and the state after the last token."""
        spec = self.spec
        in_context, out_context = context.split(2)
        projected = checkpoint_name(self.in_proj(x, in_context), PRODUCT)
        gate, *parts, step = self._split(projected, context)
        # x, b and c pass through one convolution.
        convolved, inputs = self.conv1d(jnp.concatenate(parts, axis=-1), context)
        y, memory = self._mix(ACTIVATIONS[spec.activation](convolved), step, context)
        out = checkpoint_name(self.out_proj(self._gated(y, gate).astype(x.dtype), out_context), PRODUCT)
        return out, RecurrentState(inputs, memory)

    def mixing_flops(self, work: Work) -> float:
        """Returns the FLOPs of the recurrence, forward and backward.

        A token adds one outer product to the memory of each head, and reads the memory once.
        """
        return 12.0 * work.tokens * self.spec.inner_size * self.spec.state_size

    def _split(self, projected: Float[Array, "B T P"], context: Context) -> list[Array]:
        """Splits the output of ``in_proj`` into gate, x, b, c and time step, and scales them."""
        ends = list(itertools.accumulate(self.spec.parts))
        starts = [0, *ends[:-1]]
        parts = [projected[..., start:end] for start, end in zip(starts, ends, strict=True)]
        return [
            whole_sequences(part if scale == 1.0 else part * scale, context, "recurrent_heads")
            for part, scale in zip(parts, self.spec.scales, strict=True)
        ]

    def _mix(
        self, convolved: Float[Array, "B T C"], step: Float[Array, "B T N"], context: Context
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N S H"]]:
        """Returns the output of the recurrence and of the skip connection, and the memory, both float32."""
        spec = self.spec
        inner, shared, _ = itertools.accumulate(spec.parts[1:4])
        x = self._heads(convolved[..., :inner], spec.num_heads, context).astype(jnp.float32)
        b = self._heads(convolved[..., inner:shared], spec.num_groups, context)
        c = self._heads(convolved[..., shared:], spec.num_groups, context)
        step = jax.nn.softplus(step.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        step = jnp.clip(step, *spec.time_step_limit)
        log_decay = -jnp.exp(self.A_log[...].astype(jnp.float32)) * step
        stepped = step[..., None] * x
        if context.cache is not None:
            y, memory = ssd_step(stepped, log_decay, b, c, context.cache.memory)
        else:
            assert context.segment_ids is not None
            y, memory = ssd(stepped, log_decay, b, c, context.segment_ids)
        return y + self.D[...].astype(jnp.float32)[:, None] * x, memory

    def _gated(self, y: Float[Array, "B T N H"], gate: Float[Array, "B T NH"]) -> Float[Array, "B T NH"]:
        y = y.reshape(gate.shape)
        return y * jax.nn.silu(gate.astype(jnp.float32)) if self.norm is None else self.norm(y, gate)

    def _heads(self, x: Float[Array, "B T NH"], num: int, context: Context) -> Float[Array, "B T N H"]:
        return whole_sequences(x.reshape(*x.shape[:2], num, -1), context, "recurrent_heads", "head_dim")
