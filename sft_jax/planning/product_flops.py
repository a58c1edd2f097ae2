"""FLOPs of the matrix products in a program's text."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from sft_jax.planning.hlo import Array, Computation, Instruction, Program

PRODUCTS = ("convolution", "dot")


def flops_at_rate(program: Program, computation: str, double_rate: tuple[str, ...]) -> float:
    """FLOPs of all products of a computation and of those that it calls, in units of bfloat16's rate.

    Args:
        double_rate: dtypes of operands that the chip multiplies twice as fast; their products count half.
    """
    return sum(
        flops_at_rate_of(program[name], product, double_rate) for name, product in _products(program, computation)
    )


def flops_at_rate_of(computation: Computation, product: Instruction, double_rate: tuple[str, ...]) -> float:
    """The same of one product."""
    operands = [_operand(computation, product, at) for at in (0, 1)]
    is_fast = all(operand is not None and operand[0] in double_rate for operand in operands)
    return product_flops(computation, product) / (2.0 if is_fast else 1.0)


def product_flops(computation: Computation, product: Instruction) -> float:
    """FLOPs of a ``dot`` or ``convolution``; a multiply-add is two.

    The TPU compiler writes all products as convolutions. A batch dimension is then a spatial one, whose window, stride
    and padding pair each output with one input. Pairs with padding, or between the elements of a dilated input, count
    nothing.
    """
    left, right = _operand(computation, product, 0), _operand(computation, product, 1)
    if left is None or right is None:
        return 0.0
    (_, left_sizes), (_, right_sizes), out_sizes = left, right, product.arrays[0][1]
    if product.opcode == "dot":
        contracted = [int(at) for at in (product.attribute("lhs_contracting_dims") or "").split(",") if at]
        return 2.0 * math.prod(out_sizes) * math.prod(left_sizes[at] for at in contracted)
    labels, out_labels = (product.attribute("dim_labels") or "").split("->")
    left_labels, right_labels = labels.split("_")
    window = dict(part.split("=", 1) for part in (product.attribute("window") or "").split())
    flops = 2.0 * right_sizes[right_labels.index("i")]  # of a group, where there are several
    for at, label in enumerate(out_labels):
        flops *= 1 if label.isdigit() else out_sizes[at]
    for label in (label for label in out_labels if label.isdigit()):
        here = {
            name: window[name].split("x")[int(label)] for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")
            if name in window
        }  # fmt: skip
        low = int(here.get("pad", "0_0").split("_")[0])
        flops *= _pairs(
            out_sizes[out_labels.index(label)], right_sizes[right_labels.index(label)],
            left_sizes[left_labels.index(label)], int(here.get("stride", 1)), low, int(here.get("lhs_dilate", 1)),
            int(here.get("rhs_dilate", 1)),
        )  # fmt: skip
    return flops


@functools.lru_cache(maxsize=4096)
def _pairs(outputs: int, taps: int, inputs: int, stride: int, low: int, dilated: int, tap_dilated: int) -> int:
    """Pairs of an output and a tap of the window that meet an element of the input.

    >>> _pairs(outputs=5, taps=3, inputs=5, stride=1, low=1, dilated=1, tap_dilated=1)  # the ends miss one each
    13
    >>> _pairs(outputs=4, taps=4, inputs=4, stride=3, low=0, dilated=4, tap_dilated=1)  # a batch of four
    4
    """
    positions = np.arange(outputs)[:, None] * stride + np.arange(taps)[None, :] * tap_dilated - low
    met = (positions >= 0) & (positions <= (inputs - 1) * dilated) & (positions % dilated == 0)
    return int(met.sum())


def _products(program: Program, computation: str) -> Iterator[tuple[str, Instruction]]:
    """All products with the computation that each is in."""
    for one in program[computation].instructions.values():
        if one.opcode in PRODUCTS:
            yield computation, one
        elif one.opcode in ("fusion", "call"):
            for called in one.called:
                yield from _products(program, called)


def _operand(computation: Computation, product: Instruction, index: int) -> Array | None:
    made = computation.operand(product, index)
    return made.arrays[0] if made is not None and made.arrays else None
