"""The activations that fused functions compute, by name, in PyTorch's differentiable functions."""

from __future__ import annotations

import functools

import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "hardsigmoid": lambda u: F.relu6(u + 3) / 6,  # PyTorch's own differentiates by float32's sixth
}
