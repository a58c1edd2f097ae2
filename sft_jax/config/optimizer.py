"""The section ``optimizer``."""

from __future__ import annotations

from dataclasses import dataclass

from sft_jax.config.checks import one_of, require


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its schedule. Norms and biases have no weight decay."""

    name: str = "adamw"  # optimizer: adamw
    learning_rate: float = 2.0e-4  # peak learning rate
    schedule: str = "cosine"  # learning rate schedule: constant | linear | cosine | wsd (warmup, stable, decay)
    warmup_ratio: float = 0.03  # fraction of all steps that are warmup
    weight_decay: float = 0.0  # decoupled weight decay; not applied to norms and biases
    max_grad_norm: float | None = 1.0  # gradient clipping by the global norm; null: no clipping
    b1: float = 0.9  # Adam's beta1
    b2: float = 0.999  # Adam's beta2
    eps: float = 1.0e-8  # Adam's epsilon
    moments: str = "float32"  # Adam's moments: float32 | bfloat16 | factored (second moment by rows and columns)
    spike_guard: str | None = None  # at a spike of the gradient norm: skip the update, or stop the run; null: neither
    spike_factor: float = 10.0  # a spike: a gradient norm of more than this times its running average

    def __post_init__(self) -> None:
        one_of(self.name, "optimizer.name", ("adamw",))
        one_of(self.moments, "optimizer.moments", ("float32", "bfloat16", "factored"))
        require(
            self.spike_guard in (None, "skip", "stop"),
            "optimizer.spike_guard",
            f"{self.spike_guard!r} is not one of skip, stop, null",
        )
        require(self.spike_factor > 1, "optimizer.spike_factor", f"{self.spike_factor} is not above 1")
        one_of(self.schedule, "optimizer.schedule", ("constant", "linear", "cosine", "wsd"))
        require(self.learning_rate >= 0, "optimizer.learning_rate", f"{self.learning_rate} is negative")
        require(0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", f"{self.warmup_ratio} is not in [0, 1)")
        require(self.weight_decay >= 0, "optimizer.weight_decay", f"{self.weight_decay} is negative")
        require(0 <= self.b1 < 1, "optimizer.b1", f"{self.b1} is not in [0, 1)")
        require(0 <= self.b2 < 1, "optimizer.b2", f"{self.b2} is not in [0, 1)")
        require(self.eps > 0, "optimizer.eps", f"{self.eps} is not positive")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "optimizer.max_grad_norm",
            f"{self.max_grad_norm} is not positive (null turns clipping off)",
        )
