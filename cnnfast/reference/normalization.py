"""Batch norm, activations with PyTorch's derivatives at the kinks, and what is fused of them and a convolution.

Activations let NaN pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .convolution import conv2d
from .windows import Size2


def _gelu_tanh(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


ACTIVATIONS: dict[str | None, Callable[[Tensor, Any], Tensor]] = {
    None: lambda u, slope: u,
    "relu": lambda u, slope: torch.where(u <= 0, 0.0, u),
    "leaky_relu": lambda u, slope: torch.where(u > 0, u, u * slope),
    "relu6": lambda u, slope: torch.where(u <= 0, 0.0, torch.where(u >= 6, 6.0, u)),
    "gelu": lambda u, slope: 0.5 * u * (1 + torch.erf(u / math.sqrt(2))),
    "gelu_tanh": lambda u, slope: _gelu_tanh(u),
    "silu": lambda u, slope: u * torch.sigmoid(u),
    "hardswish": lambda u, slope: torch.where(u < -3, 0.0, torch.where(u > 3, u, u * (u + 3) / 6)),
    "mish": lambda u, slope: u * torch.tanh(torch.logaddexp(u, torch.zeros_like(u))),
    "prelu": lambda u, slope: torch.where(u > 0, u, u * slope.view(-1, *[1] * (u.dim() - 2))),
    "hardsigmoid": lambda u, slope: torch.where(u <= -3, 0.0, torch.where(u >= 3, 1.0, (u + 3) / 6)),
}


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """(input - mean) * weight / sqrt(var + eps) + bias; in training the running variance takes the unbiased one."""
    per_channel = [1, -1, *[1] * (input.dim() - 2)]
    if training:
        others = [d for d in range(input.dim()) if d != 1]
        count = input.numel() // input.shape[1]
        mean = input.mean(others)
        var = (input - mean.view(per_channel)).square().mean(others)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
                running_var.copy_((1 - momentum) * running_var + momentum * var * (count / (count - 1)))
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    y = (input - mean.view(per_channel)) / torch.sqrt(var.view(per_channel) + eps)
    y = y if weight is None else y * weight.view(per_channel)
    return y if bias is None else y + bias.view(per_channel)


def conv_bn_act(
    input: Tensor, weight: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    bn_weight: Tensor | None = None, bn_bias: Tensor | None = None, *,
    bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str | None = "relu", activation_arg: float | Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    stride: Size2 = 1, padding: Size2 | str = 0, dilation: Size2 = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv2d(input)) + residual)."""
    y = conv2d(input, weight, bias, stride, padding, dilation, groups)
    u = batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return _add_and_activate(u, residual, activation, activation_arg)


def conv_act(
    input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Size2 = 1, padding: Size2 | str = 0, dilation: Size2 = 1, groups: int = 1, *,
    residual: Tensor | None = None, activation: str | None = "relu", activation_arg: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(conv2d(input) + residual)."""
    y = conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _add_and_activate(y, residual, activation, activation_arg)


def bn_act(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    residual: Tensor | None = None, activation: str | None = "relu", activation_arg: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(input) + residual)."""
    u = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _add_and_activate(u, residual, activation, activation_arg)


def _add_and_activate(
    u: Tensor, residual: Tensor | None, activation: str | None, activation_arg: float | Tensor | None
) -> Tensor:
    u = u if residual is None else u + residual
    return ACTIVATIONS[activation](u, 0.01 if activation_arg is None else activation_arg)
