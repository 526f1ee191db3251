"""pool(act(bn(conv(x)))) of existing modules: what networks begin with, in training one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import ActivationName
from ..functional.entrance import captured
from ..functional.pooled import conv_bn_act_pool as computed
from .fused import conv_bn_act, why_watched
from .layers import MaxPool2d, running_statistics, synchronising_group
from .operands import operands
from .rest import Slope


def conv_bn_act_pool(
    conv: torch.nn.Conv2d | torch.nn.Conv1d,
    bn: torch.nn.Module,
    x: Tensor,
    pool: torch.nn.Module,
    activation: ActivationName | None = None,
    activation_arg: Slope = None,
) -> Tensor:
    """pool(conv_bn_act(conv, bn, x, None, activation, activation_arg)): the same bits, and the same errors.

    The pool is called, unless it is a max pool of PyTorch's or ours that nobody watches, after a 2-D convolution and a
    norm that takes statistics of its own batch, and gradients are recorded.
    """
    if not _as_one(conv, bn, pool, activation):
        return pool(conv_bn_act(conv, bn, x, None, activation, activation_arg))
    images, group = operands(conv, x), synchronising_group(bn, x)
    mean, var, training, momentum = running_statistics(bn)
    window: Any = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    return computed(
        images.x,
        images.weight,
        mean,
        var,
        bn.weight,  # pyright: ignore[reportArgumentType]
        bn.bias,  # pyright: ignore[reportArgumentType]
        window,
        bias=images.bias,
        activation=activation,
        activation_arg=activation_arg,
        training=training,
        momentum=momentum,
        eps=bn.eps,  # pyright: ignore[reportArgumentType]
        stride=images.stride,
        padding=images.padding,
        dilation=images.dilation,
        groups=images.groups,
        process_group=group,
    )


def _as_one(conv: Any, bn: Any, pool: Any, activation: ActivationName | None) -> bool:
    """Whether the one operator may be asked for. While calls are captured the pool is called, so that it is seen."""
    return (
        torch.is_grad_enabled()
        and bn.training
        and getattr(bn, "track_running_stats", None) is not None
        and activation != "prelu"
        and isinstance(conv, torch.nn.Conv2d)
        and getattr(type(pool), "forward", None) in (MaxPool2d.forward, torch.nn.MaxPool2d.forward)
        and not pool.return_indices
        and not captured()
        and not why_watched(pool)
    )
