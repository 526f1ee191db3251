"""Matrix products: fully connected layers, and convolutions that look at one pixel at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import Step
from .activations import fused, in_place
from .elementwise import by_pytorch
from .routines import Lookup, Routine, Values, by_parameter

# An operator of oneDNN's works for about 10 us on the host before it computes anything, a call of BLAS for 1. In return
# oneDNN multiplies faster, because its weights are packed and, on some CPUs, because its vectors are wider than those
# that BLAS uses there. The two meet at one to two million multiplications.
LARGEST_FOR_BLAS = 1_000_000


@dataclass(frozen=True)
class MatrixProduct:
    """activation(x @ weight.T + bias + residual) over the last dimension of x [..., C]. weight [K, C], bias [K]; rows:
    how many rows x has.
    """

    weight: Tensor
    bias: Tensor | None
    rows: int
    activation: str | None
    numbers: Sequence[float]

    @property
    def is_small(self) -> bool:
        return self.rows * self.weight.numel() <= LARGEST_FOR_BLAS and self.weight.dtype == torch.float32


Multiply = Callable[[Tensor, Tensor | None], Tensor]


def finished(y: Tensor, residual: Tensor | None, activate: Callable[[Tensor], object] | None) -> Tensor:
    """What a product does not do itself, done in its result."""
    if residual is not None:
        y.add_(residual)
    if activate is not None:
        activate(y)
    return y


def with_blas(product: MatrixProduct) -> tuple[str, Multiply]:
    weight = product.weight.t()
    activate = in_place(product.activation, product.numbers)
    C, K = weight.shape
    bias = torch.zeros(K) if product.bias is None else product.bias

    def multiply(x: Tensor, residual: Tensor | None) -> Tensor:
        return finished(torch.addmm(bias, x.reshape(-1, C), weight).view(*x.shape[:-1], K), residual, activate)

    return "matrix product", multiply


def with_pytorch(product: MatrixProduct) -> tuple[str, Multiply]:
    weight, bias = product.weight, product.bias
    activate = in_place(product.activation, product.numbers)

    def multiply(x: Tensor, residual: Tensor | None) -> Tensor:
        return finished(F.linear(x, weight, bias), residual, activate)

    return "PyTorch (linear)", multiply


def with_onednn(product: MatrixProduct) -> tuple[str, Multiply]:
    operators = torch.ops.mkldnn
    weight: Any = operators._reorder_linear_weight(product.weight.contiguous(), product.rows)
    bias, activation = product.bias, product.activation
    last = fused(activation, product.numbers)
    activate = None if last is not None else in_place(activation, product.numbers)
    attr, scalars, algorithm = last or ("none", [], "")
    pass_after_sum = in_place(activation, product.numbers)
    linear, linear_and_add = operators._linear_pointwise.default, operators._linear_pointwise.binary

    def multiply(x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return finished(linear(x, weight, bias, attr, scalars, algorithm), None, activate)
        return finished(linear_and_add(x, residual, weight, bias, "add"), None, pass_after_sum)

    name = "oneDNN matrix product"
    return name if activation is None or last is None else f"{name} + {activation}", multiply


def choose(product: MatrixProduct, onednn: bool) -> tuple[str, Multiply]:
    if product.is_small:
        return with_blas(product)
    return with_onednn(product) if onednn else with_pytorch(product)


def linear(step: Step, lookup: Lookup, onednn: bool) -> Routine:
    given = by_parameter(step)
    if lookup.is_computed(given["weight"]) or lookup.is_computed(given["bias"]):
        return by_pytorch(step, lookup)  # there is nothing to pack before a run
    weight, bias = lookup.constant(given["weight"]), lookup.constant(given["bias"])
    assert weight is not None
    x = lookup.number(given["x"])
    shape = lookup.shape(given["x"])
    product = MatrixProduct(weight, bias, torch.Size(shape[:-1]).numel(), given["activation"], given["numbers"])
    name, multiply = choose(product, onednn)
    return Routine(name, lambda values, out: multiply(values[x], None))


def pixelwise(step: Step, lookup: Lookup, onednn: bool) -> Routine:
    """A convolution of one tap with stride 1: a product over the channels of every pixel."""
    given = by_parameter(step)
    weight, bias = lookup.constant(given["weight"]), lookup.constant(given["bias"])
    assert weight is not None
    x, residual = lookup.number(given["x"]), lookup.optional_number(given["residual"])
    N, C, *sizes = lookup.shape(given["x"])
    product = MatrixProduct(
        weight.reshape(weight.shape[0], C), bias, torch.Size([N, *sizes]).numel(), given["activation"], given["numbers"]
    )
    name, multiply = choose(product, onednn)
    to_rows = (0, *range(2, len(sizes) + 2), 1)
    to_channels = (0, len(sizes) + 1, *range(1, len(sizes) + 1))

    def compute(values: Values, out: None) -> Tensor:
        added = None if residual is None else values[residual].permute(to_rows)
        return multiply(values[x].permute(to_rows), added).permute(to_channels)

    return Routine(name, compute)
