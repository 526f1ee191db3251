"""Tells torch.utils.flop_counter how many FLOPs our convolutions have: as many as PyTorch's own, taps in the padding
counted. The summary of a model, conversion's report and bench count by its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from cnnfast_kernels.problem import output_extent

from . import block, conv, conv_norm, conv_norm_pool, gram  # noqa: F401 - define the operators
from .block_positions import members_of, trained_of

OPERATORS = torch.ops.cnnfast


def _flops(y_shape: Sequence[int], w_shape: Sequence[int]) -> int:
    """FLOPs of a convolution that gives y [N, K, P, Q]; each of its gradients has as many."""
    N, _, P, Q = y_shape
    return 2 * N * P * Q * prod(w_shape)


@register_flop_formula([OPERATORS.conv_fprop, OPERATORS.conv_bn_act, OPERATORS.conv_act])
def _fprop(x_shape, w_shape, *rest: Any, out_shape, **options: Any) -> int:
    return _flops(out_shape, w_shape)


@register_flop_formula([OPERATORS.conv_stats, OPERATORS.conv_bn_act_training, OPERATORS.conv_bn_act_by_gram])
def _stats(x_shape, w_shape, *rest: Any, out_shape, **options: Any) -> int:
    return _flops(out_shape[0], w_shape)


@register_flop_formula(OPERATORS.conv_bn_act_pool_training)
def _pooled(x_shape, w_shape, *rest: Any, out_shape, **options: Any) -> int:
    return _flops(out_shape[1], w_shape)


@register_flop_formula([OPERATORS.conv_dgrad, OPERATORS.conv_dgrad_below])
def _dgrad(dy_shape, w_shape, *rest: Any, **options: Any) -> int:
    return _flops(dy_shape, w_shape)


@register_flop_formula(OPERATORS.conv_wgrad)
def _wgrad(x_shape, dy_shape, w_shape, *rest: Any, **options: Any) -> int:
    return _flops(dy_shape, w_shape)


@register_flop_formula(OPERATORS.conv_bn_act_backward)
def _backward(dz_shape, *rest: Any, **options: Any) -> int:
    w_shape, _, (dx, dw, *_) = rest[-8:-5]
    return (dx + dw) * _flops(dz_shape, w_shape)


@register_flop_formula(OPERATORS.conv_bn_act_by_gram_backward)
def _gram_backward(dz_shape, z_shape, beta_shape, activation, slope, x_shape, w_shape, *rest: Any, **options) -> int:
    dx, dw, *_ = rest[-1]
    return (dx + dw) * _flops(dz_shape, w_shape)


@register_flop_formula(OPERATORS.conv_bn_act_pool_backward)
def _pooled_backward(dz_shape, taps_shape, at_max_shape, y_shape, *rest: Any, **options: Any) -> int:
    w_shape, _, (dx, dw, *_) = rest[-8:-5]
    return (dx + dw) * _flops(y_shape, w_shape) if dx or dw else 0


def _after(image: Sequence[int], w: Sequence[int], geometry: Any) -> tuple[int, ...]:
    """The size of what a convolution gives."""
    stride, padding, dilation, _ = geometry
    P = output_extent(image[2], w[2], stride[0], padding[0], padding[1], dilation[0])
    Q = output_extent(image[3], w[3], stride[1], padding[2], padding[3], dilation[1])
    return image[0], w[0], P, Q


@register_flop_formula([OPERATORS.basic_block, OPERATORS.bottleneck])
def _block(*arguments: Any, **options: Any) -> int:
    x, branch, projection, *_ = members_of(arguments)
    image: Any = x
    total = 0
    for layer in branch:
        image = _after(image, layer.w, layer.geometry)  # pyright: ignore[reportArgumentType]
        total += _flops(image, layer.w)  # pyright: ignore[reportArgumentType]
    return total + (_flops(image, projection.w) if projection is not None else 0)  # pyright: ignore[reportArgumentType]


@register_flop_formula([OPERATORS.basic_block_backward, OPERATORS.bottleneck_backward])
def _block_backward(*arguments: Any, **options: Any) -> int:
    _, x, _, _, branch, projection, _, dx, _ = trained_of(arguments)
    image: Any = x
    total, wanted = 0, dx
    for layer in branch:
        image = _after(image, layer.w, layer.geometry)  # pyright: ignore[reportArgumentType]
        total += (wanted + layer.needs[0]) * _flops(image, layer.w)  # pyright: ignore[reportArgumentType]
        wanted = wanted or any(layer.needs)
    if projection is not None:
        total += (dx + projection.needs[0]) * _flops(image, projection.w)  # pyright: ignore[reportArgumentType]
    return total
