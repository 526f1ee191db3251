"""Our operators in PyTorch's own.

They serve in a backward pass under a transform that was not yet active when the forward pass ran, as in
torch.func.vmap(lambda v: torch.autograd.grad(y, x, v)): PyTorch has rules for its own operators, and none for ours.
They also serve where a forward pass runs only to tell which operators it calls, before their kernels are compiled
(calls.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..activations import activate


def pad(x: Tensor, padding: Any, sign: int = 1) -> Tensor:
    """x with (top, bottom, left, right) zeros around it, or with `sign` -1 without so many rows and columns."""
    top, bottom, left, right = padding
    return F.pad(x, (sign * left, sign * right, sign * top, sign * bottom))


def conv_fprop(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """how: the positions conv_implementations.GEOMETRY."""
    stride, padding, dilation, groups, _ = how
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x, top, left = pad(x, padding), 0, 0
    return F.conv2d(x, w, bias, stride, (top, left), dilation, groups)


def conv_dgrad(dy: Tensor, w: Tensor, bias: Tensor | None, x_shape, channels_last, *how: Any) -> Tensor:
    stride, padding, dilation, groups, _ = how
    N, C, H, W = x_shape
    top, bottom, left, right = padding
    padded = conv2d_input((N, C, H + top + bottom, W + left + right), w, dy, stride, 0, dilation, groups)
    dx = pad(padded, padding, -1)
    return dx if bias is None else dx + bias.view(-1, 1, 1)


def conv_wgrad(x: Tensor, dy: Tensor, w_shape, channels_last, *how: Any) -> Tensor:
    stride, padding, dilation, groups, _ = how
    return conv2d_weight(pad(x, padding), w_shape, dy, stride, 0, dilation, groups)


def batch_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    axes = [0, *range(2, y.dim())]
    return y.mean(axes), y.var(axes, correction=0)


def conv_stats(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = conv_fprop(x, w, bias, *how)
    return y, *batch_moments(y.detach())


def gram_statistics(x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, mu: Tensor | None) -> tuple[Tensor, ...]:
    met = x[:, :, :: stride[0], :: stride[1]].transpose(0, 1).flatten(1).float()
    filters = w.detach().flatten(1).float()
    products = filters @ torch.cov(met, correction=0).view(len(met), -1)
    mean = filters @ met.mean(1)
    mean = mean if bias is None else mean + bias
    return mean, (products * filters).sum(1), met.mean(1) if mu is None else mean[:0].clone(), products


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int
) -> None:
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def normalize(y: Tensor, mean, var, gamma, beta, residual, eps, activation, slope, slopes, training) -> Tensor:
    if mean is None:
        u = y if beta is None else y + beta.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
    else:
        u = F.batch_norm(y, None if training else mean, None if training else var, gamma, beta, training, 0.0, eps)
    return activate(u if residual is None else u + residual, activation, slope if slopes is None else slopes)


def conv_bn_act(
    x: Tensor, w: Tensor, bias, mean, var, gamma, beta, residual, eps, activation, slope, slopes, *how: Any
) -> Tensor:
    y = conv_fprop(x, w, bias, *how)
    return normalize(y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, False)


def normalize_words(*arguments: Any) -> tuple[Tensor]:
    """Without the words."""
    return (normalize(*arguments),)


def normalize_mean(y: Tensor, mean, var, gamma, beta, eps, activation, slope) -> tuple[Tensor, Tensor]:
    z = normalize(y, mean, var, gamma, beta, None, eps, activation, slope, None, False)
    return z, batch_moments(z)[0]


def conv_bn_act_words(*arguments: Any) -> tuple[Tensor]:
    """Without the words."""
    return (conv_bn_act(*arguments),)


def conv_act(x: Tensor, w: Tensor, bias, residual, activation, slope, slopes, *how: Any) -> Tensor:
    y = conv_fprop(x, w, bias, *how)
    return normalize(y, None, None, None, None, residual, 0.0, activation, slope, slopes, False)


def channel_sum(x: Tensor) -> Tensor:
    return x.sum((0, *range(2, x.dim())))


def max_pool(x: Tensor, with_taps: bool, *window: Any) -> tuple[Tensor, Tensor]:
    """Positions h * W + w in the place of taps."""
    return F.max_pool2d_with_indices(x, *window)


def normalize_max_pool(
    y: Tensor, mean, var, gamma, beta, eps, activation, slope, size, stride, padding, ceil_mode
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions h * W + w in the place of taps."""
    z = normalize(y, mean, var, gamma, beta, None, eps, activation, slope, None, True)
    pooled, winners = F.max_pool2d_with_indices(z, size, stride, padding, (1, 1), ceil_mode)
    return pooled, winners, y.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)


def max_pool_backward(dy: Tensor, winners: Tensor, x_shape) -> Tensor:
    """winners: int64 positions h * W + w, as max_pool2d returns them."""
    N, C, H, W = x_shape
    return dy.new_zeros(N, C, H * W).scatter_add(2, winners.flatten(2), dy.flatten(2)).view(N, C, H, W)


def avg_pool(x: Tensor, *window: Any) -> Tensor:
    return F.avg_pool2d(x, *window)


def avg_pool_backward(dy: Tensor, x_shape, channels_last, *window: Any) -> Tensor:
    return torch.ops.aten.avg_pool2d_backward(dy, dy.new_zeros(x_shape), *window)


def adaptive_avg_pool(x: Tensor, output_size) -> Tensor:
    return F.adaptive_avg_pool2d(x, output_size)


def global_avg_pool(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def adaptive_avg_pool_backward(dy: Tensor, x_shape, channels_last) -> Tensor:
    return torch.ops.aten._adaptive_avg_pool2d_backward(dy, dy.new_zeros(x_shape))
