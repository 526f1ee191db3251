"""A second product that a convolution's gradient begins with, in the same accumulator: the term that the input's own
gradient has where a norm's statistics follow from that input (gram.py).

    dx[n, h, w, c] = shift[c] + scale[c] * sum over i of own[c, i] * x[n, h, w, i] + the gradient of the convolution

Kernels by tensor maps sum it (tma/dgrad.py). For others it is a forward pass of its own, whose result they add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class SecondProduct(NamedTuple):
    """x [N, C, H, W], of the gradient's shape and dtype, in any layout; own [C, C, 1, 1] of its dtype and contiguous;
    scale and shift [C], float32 and contiguous.
    """

    x: torch.Tensor
    own: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor


def check_second_product(
    second: SecondProduct, shape: Sequence[int], dtype: torch.dtype, pointwise: bool, name: str = "second"
) -> None:
    """Raises ValueError where a second product does not fit a gradient of this shape [N, C, H, W] and dtype. pointwise:
    whether the convolution is 1x1, of stride 1 and one group and without padding.
    """
    if not pointwise:
        raise ValueError(
            f"{name} is for the gradient of a 1x1 convolution of stride 1 and one group without padding alone"
        )
    C = shape[1]
    wanted = {"x": (tuple(shape), dtype), "own": ((C, C, 1, 1), dtype)}
    wanted |= dict.fromkeys(("scale", "shift"), ((C,), torch.float32))
    for field, (right, of) in wanted.items():
        t = getattr(second, field)
        if t.shape != right or t.dtype != of:
            raise ValueError(
                f"{name}.{field} must have shape {right} and dtype {of}, but has {tuple(t.shape)} and {t.dtype}"
            )
        if field != "x" and not t.is_contiguous():
            raise ValueError(f"{name}.{field} must be contiguous, but has strides {t.stride()}")
