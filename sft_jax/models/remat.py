"""Rematerialization policies: which activations of a layer are saved for the backward pass.

Layers name expensive activations with ``checkpoint_name``, and a policy lists the names to save. Norms, rotations and
activation functions are always recomputed: that costs less than writing and reading them. Of a norm the mean square is
saved, one number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # product of activations and a weight, or of two such products
ATTENTION = "attention"  # attention output, and the log-sum-exp for its backward pass
ADAPTER = "adapter"  # product of activations and the A of an adapter
MEAN_SQUARE = "mean_square"  # of a norm's input
CUDNN = "dot_product_attention_fwd_wrapper"  # name of the cuDNN primitive in jax

# From the fastest step to the least memory.
POLICIES = {
    "none": None,  # save everything
    "dots": (PRODUCT, ATTENTION, ADAPTER, MEAN_SQUARE),  # no matrix product is computed twice
    "attention": (ATTENTION, ADAPTER, MEAN_SQUARE),  # products with weights are recomputed, attention is not
    "full": (ADAPTER, MEAN_SQUARE),  # save the inputs of layers, and what is small and takes long to recompute
}


def rematerialize(layer: Callable, policy: str, in_scan: bool = True) -> Callable:
    """Applies a policy (a key of :data:`POLICIES`) to the body of a scan over layers, or to another function."""
    names = POLICIES[policy]
    if names is None:
        return layer
    saveable = jax.checkpoint_policies.save_only_these_names(*names)
    if ATTENTION in names:
        saveable = jax.checkpoint_policies.save_from_both_policies(saveable, _is_cudnn)
    return jax.checkpoint(layer, policy=saveable, prevent_cse=not in_scan)


def _is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves the outputs of cuDNN attention, output and log-sum-exp, which jax does not name."""
    return primitive.name == CUDNN


__all__ = ["ADAPTER", "ATTENTION", "CUDNN", "MEAN_SQUARE", "POLICIES", "PRODUCT", "checkpoint_name", "rematerialize"]
