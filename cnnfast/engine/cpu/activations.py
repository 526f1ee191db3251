"""Activations: as oneDNN computes them on its way out of a product, and as a pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What `torch.ops.mkldnn` calls an activation, its numbers where none are given, and its algorithm.
_FUSED: dict[str | None, tuple[str, tuple[float, ...], str]] = {
    None: ("none", (), ""),
    "relu": ("relu", (), ""),
    "hardtanh": ("hardtanh", (-1.0, 1.0), ""),
    "leaky_relu": ("leaky_relu", (0.01,), ""),
    "silu": ("swish", (), ""),
    "hardswish": ("hardswish", (), ""),
    "hardsigmoid": ("hardsigmoid", (), ""),
    "gelu": ("gelu", (), "none"),
    "gelu_tanh": ("gelu", (), "tanh"),
    "sigmoid": ("sigmoid", (), ""),
    "tanh": ("tanh", (), ""),
}

# Written over their argument.
_IN_PLACE: dict[str, Callable[..., Any]] = {
    "relu": torch.relu_,
    "hardtanh": lambda u, lowest=-1.0, highest=1.0: F.hardtanh(u, lowest, highest, inplace=True),
    "leaky_relu": lambda u, slope=0.01: F.leaky_relu(u, slope, inplace=True),
    "silu": lambda u: F.silu(u, inplace=True),
    "hardswish": lambda u: F.hardswish(u, inplace=True),
    "hardsigmoid": lambda u: F.hardsigmoid(u, inplace=True),
    "gelu": lambda u: torch.ops.aten.gelu_.default(u),
    "gelu_tanh": lambda u: torch.ops.aten.gelu_.default(u, approximate="tanh"),
    "mish": lambda u: F.mish(u, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "elu": lambda u, alpha=1.0: F.elu(u, alpha, inplace=True),
}


def fused(activation: str | None, numbers: Sequence[float]) -> tuple[str, list[float], str] | None:
    """attr, scalars and algorithm, the last arguments of `torch.ops.mkldnn`'s operators; None of an activation that
    they do not know.
    """
    if activation not in _FUSED:
        return None
    attr, defaults, algorithm = _FUSED[activation]
    return attr, [*numbers, *defaults[len(numbers) :]], algorithm


def in_place(activation: str | None, numbers: Sequence[float]) -> Callable[[Tensor], Any] | None:
    """Writes an activation over its argument; None where there is nothing to do."""
    if activation is None:
        return None
    function = _IN_PLACE[activation]
    return (lambda u: function(u, *numbers)) if numbers else function
