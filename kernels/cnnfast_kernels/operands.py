"""The tensors of a convolution's launch, by name: what a prepared launch is called with.

Their order is that of the kernels' first parameters, so that a launch hands a record on as it is. Kernels that have
other tensors keep their records beside them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FpropOperands(NamedTuple):
    """x [N, C, H, W], w [K, C / groups, R, S] and the result y [N, K, P, Q]; what of the rest is absent is None.

    bias and the batch norm's mean, var, gamma and beta: [K], contiguous. residual: of y's shape. beside: where the
    kernel leaves mean and variance of each of its tiles of y, [tiles, 2, K] in the accumulator's dtype; or words of
    bits of y (words.py). slopes: prelu's, [1] or [K], contiguous.
    """

    x: Tensor
    w: Tensor
    y: Tensor
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: Tensor | None = None
    beside: Tensor | None = None
    slopes: Tensor | None = None


class DgradOperands(NamedTuple):
    """dy [N, K, P, Q], w [K, C / groups, R, S] and the result dx [N, C, H, W]; what of the rest is absent is None.

    bias [C] is added. residual, y, z, words and the batch norm's mean, var, gamma and beta: what
    gradient_epilogue.GradientEpilogue has. slots: where the kernel leaves the sums of each of its tiles, [tiles, 1, C],
    or [tiles, 2, C] where there is y, in the accumulator's dtype.
    """

    dy: Tensor
    w: Tensor
    dx: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    y: Tensor | None = None
    z: Tensor | None = None
    words: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    slots: Tensor | None = None


class BoxDgradOperands(NamedTuple):
    """DgradOperands of kernels by tensor maps, and what second_product.SecondProduct has: x as dx, own [C, C, 1, 1],
    scale and shift [C] in float32.
    """

    dy: Tensor
    w: Tensor
    dx: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    y: Tensor | None = None
    z: Tensor | None = None
    words: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    slots: Tensor | None = None
    x: Tensor | None = None
    own: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class WgradOperands(NamedTuple):
    """x [N, C, H, W], dy [N, K, P, Q] and the result dw [K, C / groups, R, S], or slots of it, one after the other."""

    x: Tensor
    dy: Tensor
    dw: Tensor
