"""cnnfast's operators in plain PyTorch: the kernels' path is taken and traced, and every number is PyTorch's own.

For tests of what is built of operators: whole networks run at PyTorch's speed where the interpreter would need minutes,
and agree with the original to the last bits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.ops.block_positions import OF_RECORD, Member, flat_geometry, mean_of_last, members_of
from cnnfast.ops.plain import (
    adaptive_avg_pool,
    avg_pool,
    batch_moments,
    conv_act,
    conv_bn_act,
    conv_fprop,
    conv_stats,
    global_avg_pool,
    max_pool,
    normalize,
    normalize_max_pool,
    update_running,
)
from cnnfast.recording import recorded


def conv_dgrad(
    dy: Tensor, w: Tensor, bias: Tensor | None, x_shape, channels_last, stride, padding, dilation, groups, algorithm
) -> Tensor:
    top, bottom, left, right = padding
    return F.conv_transpose2d(dy, w, bias, stride, (top, left), (top - bottom, left - right), groups, dilation)


def max_pool_indices(taps: Tensor, x_shape: torch.Size, *window: Any) -> Tensor:
    return taps


OPERATORS = (conv_fprop, conv_dgrad, conv_stats, conv_bn_act, conv_act, batch_moments, update_running, normalize)
OPERATORS += (max_pool, normalize_max_pool, max_pool_indices, avg_pool, adaptive_avg_pool, global_avg_pool)


def plain_operators() -> SimpleNamespace:
    """What stands in for cnnfast.functional's `ops`."""
    ops = SimpleNamespace(**{operator.__name__: recorded(operator.__name__)(operator) for operator in OPERATORS})

    def conv_bn_act_training(x: Tensor, w: Tensor, bias, mean, var, training, momentum, *rest: Any) -> tuple[Any, ...]:
        y, *own = ops.conv_stats(x, w, bias, *rest[-5:])
        if mean is not None and y.shape[0]:
            ops.update_running(mean, var, *own, momentum, y.numel() // y.shape[1])
        return ops.normalize(y, *own, *rest[:-5], True), y, *own

    def conv_bn_act_pool_training(x: Tensor, w: Tensor, bias, mean, var, momentum, *rest: Any) -> tuple[Any, ...]:
        y, *own = ops.conv_stats(x, w, bias, *rest[-5:])
        if mean is not None and y.shape[0]:
            ops.update_running(mean, var, *own, momentum, y.numel() // y.shape[1])
        z, *found = ops.normalize_max_pool(y, *own, *rest[:-5])
        return z, y, *found, *own

    def block(*arguments: Any) -> tuple[Any, ...]:
        x, branch, projection, _, algorithm = members_of(arguments)

        def layer(image: Tensor, member: Member, residual: Tensor | None, activation: str | None) -> Tensor:
            end = member.gamma, member.beta, residual, member.eps, activation, 0.0, None
            running = member.mean, member.var, True, member.momentum
            return conv_bn_act_training(image, member.w, None, *running, *end, *member.geometry, algorithm)[0]

        z = x
        for member in branch[:-1]:
            z = layer(z, member, None, "relu")
        residual = x if projection is None else layer(x, projection, None, None)
        records = [None] * OF_RECORD * (len(branch) + 1)
        return layer(z, branch[-1], residual, "relu"), None, *records

    ops.basic_block = ops.bottleneck = block
    ops.mean_of_last = mean_of_last
    ops.flat_geometry, ops.kernels_serve_block = flat_geometry, lambda *arguments: True
    ops.gram_serves = lambda *arguments: False
    ops.conv_bn_act_training = conv_bn_act_training
    ops.conv_bn_act_pool_training = conv_bn_act_pool_training
    return ops
