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
}


def activate(u: Tensor, activation: str | None, slope: float = LEAKY_SLOPE) -> Tensor:
    return ACTIVATIONS[activation](u, slope)
