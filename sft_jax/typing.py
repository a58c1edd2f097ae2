"""The letters of the house and the batch.

Letters, in signatures and einsum strings alike: B batch, T query position, S key position, D model, F feed-forward,
N query heads, K key/value heads, G = N/K, H head dim, V vocabulary, R rank, L layers, A microbatches, C chunk.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all fields ``[B, T]``; numpy until they are placed on the mesh.

    A conversation with the ids ``[7, 8, 9, 2]`` of which ``[9, 2]`` are the answer and its stop token becomes, in a
    row of five slots::

        inputs        7 8 9 0 0
        targets       8 9 2 0 0
        loss_mask     0 1 1 0 0     belongs to targets: shifted first, packed second; 0.5 would count half
        segment_ids   1 1 1 0 0     0 is padding; attention stays within a segment
        positions     0 1 2 0 0     restart with every segment
    """

    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    sources: Int[Array, "B T"] | None = None  # which of several sources a position is from; None where there is one


__all__ = ["Array", "Batch", "Bool", "Float", "Int"]
