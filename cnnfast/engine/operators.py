"""The operators that a plan may call, by name: those of the engine, in plain PyTorch, and a fixed list of PyTorch's.

None of them opens a file or a connection, draws random numbers, runs Python of the model's, or writes into an argument.
A file of a frozen network names operators, and what is not named here is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Activations of the fused operators: of an argument and the numbers that belong to each.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "hardtanh": F.hardtanh,  # lowest, highest: relu6 is 0, 6
    "leaky_relu": F.leaky_relu,  # slope
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,  # alpha
}


def activate(u: Tensor, activation: str | None, numbers: Sequence[float] = ()) -> Tensor:
    return u if activation is None else ACTIVATIONS[activation](u, *numbers)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    numbers: Sequence[float],
) -> Tensor:
    """activation(conv(x, weight) + bias + residual). x [N, C, *sizes], weight [K, C / groups, *taps], bias [K], and
    residual has the result's shape. One, two or three dimensions; stride, padding and dilation have a number for each.
    """
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    y = convolve(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    return activate(y if residual is None else y + residual, activation, numbers)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, numbers: Sequence[float]) -> Tensor:
    """activation(x @ weight.T + bias). x [..., C], weight [K, C], bias [K]."""
    return activate(F.linear(x, weight, bias), activation, numbers)


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str | None,
    numbers: Sequence[float],
) -> Tensor:
    """activation(x * scale + shift + residual). scale and shift [C, 1, 1], one number a channel of x [N, C, H, W]: a
    batch norm that follows no convolution.
    """
    y = torch.addcmul(shift, x, scale)
    return activate(y if residual is None else y + residual, activation, numbers)


def sum_of(x: Tensor, y: Tensor, activation: str | None, numbers: Sequence[float]) -> Tensor:
    """activation(x + y), broadcast as PyTorch does."""
    return activate(x + y, activation, numbers)


OURS: dict[str, Callable[..., Any]] = {
    "convolution": convolution,
    "linear": linear,
    "affine": affine,
    "sum": sum_of,
}

# PyTorch's, without the "aten." before each.
ATEN = (
    *("conv1d.default", "conv2d.default", "conv3d.default", "linear.default", "batch_norm.default"),
    *("relu.default", "hardtanh.default", "silu.default", "hardswish.default", "hardsigmoid.default"),
    *("gelu.default", "mish.default", "sigmoid.default", "tanh.default", "leaky_relu.default", "elu.default"),
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default", "clamp.default", "clamp.Tensor"),
    *("max_pool2d.default", "avg_pool2d.default", "adaptive_avg_pool2d.default", "mean.dim", "cat.default"),
    *("reshape.default", "flatten.using_ints", "permute.default", "transpose.int", "chunk.default", "split.Tensor"),
    *("sym_size.int", "clone.default"),  # a plan copies what it returns
)
# Arithmetic on sizes, and the members of a result that is a tuple.
PYTHON: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


def _aten(name: str) -> Callable[..., Any]:
    packet, _, overload = name.rpartition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


OPERATORS: dict[str, Callable[..., Any]] = {
    **{f"cnnfast.{name}": function for name, function in OURS.items()},
    **{f"aten.{name}": _aten(name) for name in ATEN},
    **{f"python.{name}": function for name, function in PYTHON.items()},
}
NAMES: dict[Callable[..., Any], str] = {function: name for name, function in OPERATORS.items()}


def why_not(target: Any) -> str:
    """A sentence that says why no graph may call something."""
    return f"it calls {target}, which the engine does not know"
