"""Experts: MLPs of equal shape, each applied to the tokens that its router sends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.models.context import Context
from sft_jax.models.layers import Initializer, Linear
from sft_jax.models.mlp import ACTIVATIONS
from sft_jax.models.moe.dispatch import dispatch
from sft_jax.models.moe.products import ExpertMatrix
from sft_jax.models.moe.router import RouterSpec
from sft_jax.models.moe.rows import Products
from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True)
class ExpertsSpec:
    """``down_proj(gate(gate_up_proj(x)))`` of each expert, where ``gate_up_proj`` has gate and up in one matrix.

    Attributes:
        activation: a key of :data:`~sft_jax.models.mlp.ACTIVATIONS`, of ``activation(gate) · up``.
        gated: whether there is a gate; else ``down_proj(activation(up_proj(x)))``.
        use_bias: whether both products have biases.
        interleaved: whether gate and up alternate in the outputs of ``gate_up_proj``, not first all of gate.
        clamp: ``(limit, alpha)`` of GPT-OSS: the gate is ``gate · sigmoid(alpha · gate)``, 1 is added to up, and both
            are clamped to ``limit``; None for the plain activation.
        stored_in_out: whether files have ``[experts, in, out]`` where all experts are in one tensor.
        peft_swaps: whether PEFT takes the inputs of such a tensor for its outputs, and swaps A and B (Llama 4).
    """

    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    interleaved: bool = False
    clamp: tuple[float, float] | None = None
    stored_in_out: bool = False
    peft_swaps: bool = False

    is_mixer: ClassVar[bool] = False

    @property
    def first(self) -> str:
        """The name of the first linear layer."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def parts(self) -> int:
        """The number of matrices in the first linear layer."""
        return 2 if self.gated else 1

    def gate(self, gate_up: Float[Array, "m C"]) -> Float[Array, "m F"]:
        """Returns the input of ``down_proj`` for the output of the first linear layer."""
        if not self.gated:
            return ACTIVATIONS[self.activation](gate_up)
        if self.interleaved:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        else:
            gate, up = jnp.split(gate_up, 2, axis=-1)
        if self.clamp is None:
            return ACTIVATIONS[self.activation](gate) * up
        limit, alpha = self.clamp
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(gate * alpha) * (up + 1)


class ExpertLinear(Linear):
    """The weights of one linear layer of all experts ``[*stack, E, in, out]``."""

    stack_axes = ("experts",)

    def __init__(
        self,
        spec: ExpertsSpec,
        experts: int,
        sizes: tuple[int, int],
        axis: str,
        make: Initializer,
        stack: tuple[int, ...],
    ):
        super().__init__(*sizes, (axis, "expert_out"), make, (*stack, experts))
        self.transposed = not spec.stored_in_out
        self.peft_swaps = spec.peft_swaps


class Experts(nnx.Module):
    """The module of :class:`ExpertsSpec`."""

    def __init__(self, spec: ExpertsSpec, router: RouterSpec, dim: int, make: Initializer, stack: tuple[int, ...]):
        self.spec, self.num_experts = spec, (num_experts := router.num_experts)
        size, first_size = spec.intermediate_size, spec.parts * spec.intermediate_size
        first = ExpertLinear(spec, num_experts, (dim, first_size), "expert_in", make, stack)
        first.parts = spec.parts
        setattr(self, spec.first, first)
        self.down_proj = ExpertLinear(spec, num_experts, (size, dim), "expert_mlp", make, stack)
        first.share = self.down_proj.share = router.num_experts_per_token / num_experts
        shapes = ((*stack, num_experts, first_size), (*stack, num_experts, dim))
        biases = [make.constant(0.0, shape, ("experts", "norm")) if spec.use_bias else None for shape in shapes]
        setattr(self, f"{spec.first}_bias", nnx.data(biases[0]))
        self.down_proj_bias: nnx.Param | None = nnx.data(biases[1])

    @property
    def first(self) -> ExpertLinear:
        """The first linear layer."""
        return getattr(self, self.spec.first)

    @property
    def is_adapted(self) -> bool:
        """Whether both linear layers have an adapter."""
        return self.first.variant is not None and self.down_proj.variant is not None

    def __call__(
        self,
        tokens: Float[Array, "B T D"],
        chosen: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        context: Context,
        scale_inputs: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns ``Σ weight · expert(token)`` over the chosen experts of each token.

        Args:
            scale_inputs: compute ``Σ expert(weight · token)`` instead (Llama 4).
        """
        spec = self.spec

        def compute(x: Array, weights: Array, matrices: Any, products: Products) -> Array:
            first, down = matrices
            if scale_inputs:
                return products(spec.gate(products(x * weights[:, None], first)), down)
            # Weights before the last product, not after it: they multiply fewer values, and their gradient does not
            # need its outputs.
            return products(spec.gate(products(x, first)) * weights[:, None], down, weights)

        matrices = (
            self._matrix(self.first, getattr(self, f"{spec.first}_bias"), context),
            self._matrix(self.down_proj, self.down_proj_bias, context),
        )
        return dispatch(compute, matrices, tokens, chosen, weights, self.num_experts, context)

    def _matrix(self, layer: ExpertLinear, bias: nnx.Param | None, context: Context) -> ExpertMatrix:
        adapter: Any = layer.variant
        return ExpertMatrix(
            layer.stored_matrix(),
            None if bias is None else bias[...],
            None if adapter is None else (layer.parameter("lora_a"), layer.parameter("lora_b")),
            1.0 if adapter is None else adapter.scale,
            context.layer,
        )
