"""cnnfast's operators in plain PyTorch: the kernels' path is taken and traced, and every number is PyTorch's own.

For tests of what is built of operators: whole networks run at PyTorch's speed where the interpreter would need minutes, and
agree with the original to the last bits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.activations import activate
from cnnfast.dispatch import recorded


def conv_fprop(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, algorithm) -> Tensor:
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, w, bias, stride, (top, left), dilation, groups)


def conv_dgrad(dy: Tensor, w: Tensor, bias: Tensor | None, x_shape, channels_last, stride, padding, dilation, groups, algorithm) -> Tensor:
    top, bottom, left, right = padding
    return F.conv_transpose2d(dy, w, bias, stride, (top, left), (top - bottom, left - right), groups, dilation)


def batch_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    axes = [0, *range(2, y.dim())]
    return y.mean(axes), y.var(axes, correction=0)


def conv_stats(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = conv_fprop(x, w, bias, *geometry)
    return y, *batch_moments(y.detach())


def update_running(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int) -> None:
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def normalize(y: Tensor, mean, var, weight, bias, residual, eps, activation, slope, training) -> Tensor:
    u = F.batch_norm(y, None if training else mean, None if training else var, weight, bias, training, 0.0, eps)
    return activate(u if residual is None else u + residual, activation, slope)


def conv_bn_act(x: Tensor, w: Tensor, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, slope, *geometry: Any) -> Tensor:
    return normalize(conv_fprop(x, w, bias, *geometry), mean, var, bn_weight, bn_bias, residual, eps, activation, slope, False)


def max_pool(x: Tensor, with_taps: bool, *window: Any) -> tuple[Tensor, Tensor]:
    return F.max_pool2d_with_indices(x, *window)


def max_pool_indices(taps: Tensor, x_shape: torch.Size, *window: Any) -> Tensor:
    return taps


def avg_pool(x: Tensor, *options: Any) -> Tensor:
    return F.avg_pool2d(x, *options)


def adaptive_avg_pool(x: Tensor, output_size) -> Tensor:
    return F.adaptive_avg_pool2d(x, output_size)


def global_avg_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


OPERATORS = (conv_fprop, conv_dgrad, conv_stats, conv_bn_act, batch_moments, update_running, normalize)
OPERATORS += (max_pool, max_pool_indices, avg_pool, adaptive_avg_pool, global_avg_pool)


def plain_operators() -> SimpleNamespace:
    """What stands in for cnnfast.functional's `ops`."""
    return SimpleNamespace(**{operator.__name__: recorded(operator.__name__)(operator) for operator in OPERATORS})
