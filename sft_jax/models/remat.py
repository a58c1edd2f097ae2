"""What a layer keeps for its backward pass, and what is computed again (rematerialisation).

Layers name what is expensive to make; a policy says which names are kept. Norms, rotations and activation functions are
never kept: making them again costs less than writing and reading them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name as keep

PRODUCT = "product"  # of activations with a weight matrix, or of two such products
ATTENTION = "attention"  # what attention gives, and the log-sum-exp its backward pass starts from
ADAPTER = "adapter"  # activations times the A of an adapter
CUDNN = "dot_product_attention_fwd_wrapper"  # jax's name for the call of cuDNN

# from the fastest step to the smallest memory
POLICIES = {
    "none": None,  # keep everything
    "dots": (PRODUCT, ATTENTION, ADAPTER),  # no matrix product is computed twice
    "attention": (ATTENTION, ADAPTER),  # products with weights are computed again, attention is not
    "full": (),  # keep the inputs of layers only
}


def rematerialised(layer: Callable, policy: str) -> Callable:
    """A layer that keeps what ``policy`` (a key of :data:`POLICIES`) says, to be scanned over."""
    names = POLICIES[policy]
    if names is None:
        return layer
    kept = jax.checkpoint_policies.save_only_these_names(*names)
    if ATTENTION in names:
        kept = jax.checkpoint_policies.save_from_both_policies(kept, _is_cudnn)
    return jax.checkpoint(layer, policy=kept, prevent_cse=False)


def _is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether it is jax's call of cuDNN attention: it gives output and log-sum-exp, and puts no names on them."""
    return primitive.name == CUDNN


__all__ = ["ADAPTER", "ATTENTION", "CUDNN", "POLICIES", "PRODUCT", "keep", "rematerialised"]
