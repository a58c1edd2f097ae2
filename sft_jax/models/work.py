"""What a step processes, in the numbers that FLOPs are counted from. Does not import jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a step, or a second of training, processes."""

    tokens: float  # without padding
    targets: float  # tokens that carry loss
    squares: float  # sum of squared document lengths
