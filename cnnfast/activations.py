"""The activations by name, in plain PyTorch: what the fused kernels compute, for the paths that PyTorch takes."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01

ACTIVATIONS: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda u, slope: u,
    "relu": lambda u, slope: F.relu(u),
    "leaky_relu": F.leaky_relu,
    "relu6": lambda u, slope: F.relu6(u),
    "gelu": lambda u, slope: F.gelu(u),
    "gelu_tanh": lambda u, slope: F.gelu(u, approximate="tanh"),
    "silu": lambda u, slope: F.silu(u),
    "hardswish": lambda u, slope: F.hardswish(u),
    "mish": lambda u, slope: F.mish(u),
    "hardsigmoid": lambda u, slope: F.hardsigmoid(u),
}


def activate(u: Tensor, activation: str | None, slope: float = LEAKY_SLOPE) -> Tensor:
    return ACTIVATIONS[activation](u, slope)


def check_activation(function: str, activation: str | None, activation_arg: float | None) -> None:
    """Raises ValueError, in the name of `function`, for an unknown activation or an argument that it does not take."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{function}(): activation must be one of {', '.join(map(str, ACTIVATIONS))}, "
            f"but got activation={activation!r}"
        )
    if activation_arg is not None and activation != "leaky_relu":
        raise ValueError(
            f"{function}(): activation_arg is leaky_relu's slope, "
            f"but got activation_arg={activation_arg} for {activation!r}"
        )
