"""Array types, dimension letters and the batch.

Dimension letters in signatures and einsum strings: B batch, T query position, S key position, D model, F feed-forward,
N query heads, K key/value heads, G = N/K, H head dim, V vocabulary, R LoRA rank, L layers, A microbatches, C chunk.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Packed sequences; all fields are ``[B, T]`` and numpy arrays until they are placed on the mesh.

    The conversation ``[7, 8, 9, 2]``, with the answer and its end-of-turn token ``[9, 2]``, becomes this sequence of
    length five::

        inputs        7 8 9 0 0
        targets       8 9 2 0 0
        loss_mask     0 1 1 0 0     aligned with targets; 0.5 would give a token half the weight
        segment_ids   1 1 1 0 0     0 is padding; tokens attend within their segment
        positions     0 1 2 0 0     restart at 0 in every segment
    """

    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    sources: Int[Array, "B T"] | None = None  # index of the data source of each token; None for a single source


__all__ = ["Array", "Batch", "Bool", "Float", "Int"]
