"""What TF32 costs at best: products of float32 numbers whose operands were rounded to the nearest TF32, forward and
backward, on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..precision import nearest_tf32


def rounded_products() -> TorchFunctionMode:
    """A context manager in which torch.einsum, by which alone the reference multiplies, rounds both operands, and in
    backward the gradient that comes back, which is an operand of both products there. All of them are float32.
    """
    return _RoundedProducts()


def rounded_product(product: Callable[..., Tensor], left: Tensor, right: Tensor, *how: Any) -> Tensor:
    """product(left, right, *how) of two float32 tensors, rounded likewise."""
    rounded: Any = product(_Round.apply(left), _Round.apply(right), *how)
    return _RoundGradient.apply(rounded)  # pyright: ignore[reportReturnType]


class _RoundedProducts(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.einsum:
            return func(*args, **(kwargs or {}))
        equation, *operands = args
        return rounded_product(functools.partial(func, equation), *operands)


class _Round(torch.autograd.Function):
    """Rounds in forward alone: the derivative is that of the identity."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return nearest_tf32(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _RoundGradient(torch.autograd.Function):
    """Rounds in backward alone."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return nearest_tf32(gradients[0])
