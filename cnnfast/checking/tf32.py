"""TF32 as plain float32 computes it: what the best rounding of a product's operands costs, forward and backward, on any
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..precision import nearest_tf32


def rounded_products() -> TorchFunctionMode:
    """A context manager: every torch.einsum (the one way in which the reference multiplies) rounds both operands, and
    in backward the gradient that comes back to it, which is an operand of both products there. All of them are float32.
    """
    return _RoundedProducts()


class _RoundedProducts(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.einsum:
            return func(*args, **(kwargs or {}))
        equation, *operands = args
        return _RoundGradient.apply(func(equation, *map(_Round.apply, operands)))


class _Round(torch.autograd.Function):
    """Forward alone: a derivative does not see that its operand was rounded."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return nearest_tf32(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _RoundGradient(torch.autograd.Function):
    """Backward alone."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return nearest_tf32(gradients[0])
