"""act(bn(conv(x)) + residual) of existing modules: what the blocks, and the forwards that conversion writes, are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from cnnfast_kernels.problem import output_extent

from .. import functional
from ..activations import LEAKY_SLOPE, activate
from ..dispatch import captured, why_torch
from ..functional.arguments import autocast
from .layers import BatchNorm2d, Conv2d, running_statistics


def fusable(x: Any, *modules: torch.nn.Module) -> bool:
    """Whether conv_bn_act on `x` may stand for calls of `modules`: kernels serve it, and nobody watches or replaces a member's call."""
    return served(x) and unwatched(*modules)


def served(x: Any) -> bool:
    """Whether kernels serve `x`, a 4-D tensor. While calls are captured, whoever serves them, the fused ones shall be seen."""
    return isinstance(x, Tensor) and x.dim() == 4 and (not why_torch(x) or captured())


def unwatched(*modules: torch.nn.Module) -> bool:
    """False if a module has hooks of any kind, or a forward of its own in its __dict__; under global module hooks; for a SyncBatchNorm
    in training."""
    if _has_any_global_hook():
        return False
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in m.__dict__:
            return False
        if m.training and isinstance(m, torch.nn.SyncBatchNorm):
            return False
    return True


def conv_bn_act(
    conv: torch.nn.Conv2d,
    bn: torch.nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_arg: float | None = None,
) -> Tensor:
    """act(bn(conv(x)) + residual) by the two modules' own parameters and state, without calling them: ask `fusable` first.

    conv: any torch.nn.Conv2d. bn: BatchNorm2d, whose rules about buffers, num_batches_tracked and momentum hold; SyncBatchNorm in
    eval; or a frozen norm: running_mean, running_var, weight, bias and eps, but no track_running_stats. Results have the dtype that
    the modules called one after the other would give, under autocast too: a residual of another dtype, or one that has to be
    broadcast, is added by PyTorch after the fused convolution and norm. activation, activation_arg: as functional.conv_bn_act.
    """
    if x.shape[1] != conv.in_channels:  # the convolution's own error, before the norm has counted a batch
        conv(x)
    (x,) = autocast(x)
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    if _promotes(bn, x.dtype):
        y = functional.conv2d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
        return _activate(_add(_frozen_norm(bn, y), residual), activation, activation_arg)
    fits = residual is None or (
        isinstance(residual, Tensor) and residual.dtype == x.dtype and residual.shape == _output_size(conv, x, padding)
    )
    mean, var, training, momentum = running_statistics(bn)
    y = functional.conv_bn_act(
        x,
        conv.weight,
        mean,
        var,
        bn.weight,  # pyright: ignore[reportArgumentType]
        bn.bias,  # pyright: ignore[reportArgumentType]
        bias=conv.bias,
        residual=residual if fits else None,
        activation=activation if fits else None,
        activation_arg=activation_arg if fits else None,
        training=training,
        momentum=momentum,
        eps=bn.eps,  # pyright: ignore[reportArgumentType]
        stride=conv.stride,  # pyright: ignore[reportArgumentType]
        padding=padding,
        dilation=conv.dilation,  # pyright: ignore[reportArgumentType]
        groups=conv.groups,
    )
    return y if fits else _activate(_add(y, residual), activation, activation_arg)


def is_conv2d(module: torch.nn.Module) -> bool:
    """Whether calling `module` convolves by torch.nn.Conv2d's rules: that class, ours, or a subclass that leaves the computation alone."""
    kind = type(module)
    return (
        issubclass(kind, torch.nn.Conv2d)
        and kind.forward is torch.nn.Conv2d.forward
        and kind._conv_forward in (torch.nn.Conv2d._conv_forward, Conv2d._conv_forward)
    )


def is_batch_norm(module: torch.nn.Module) -> bool:
    """The same for torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm and torchvision's FrozenBatchNorm2d."""
    kind = type(module)
    if issubclass(kind, torch.nn.BatchNorm2d | torch.nn.SyncBatchNorm):
        return kind.forward in (torch.nn.BatchNorm2d.forward, BatchNorm2d.forward, torch.nn.SyncBatchNorm.forward)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"


def _output_size(conv: torch.nn.Conv2d, x: Tensor, padding: Any) -> tuple[int, ...]:
    if padding == "same":
        return x.shape[0], conv.out_channels, *x.shape[2:]
    pads = (0, 0) if padding == "valid" else (padding, padding) if isinstance(padding, int) else padding
    P, Q = (output_extent(x.shape[2 + i], conv.kernel_size[i], conv.stride[i], pads[i], pads[i], conv.dilation[i]) for i in (0, 1))
    return x.shape[0], conv.out_channels, P, Q


def _promotes(bn: Any, dtype: torch.dtype) -> bool:
    """A frozen norm is arithmetic of tensors: of a 16-bit image and float32 parameters it makes float32."""
    return getattr(bn, "track_running_stats", None) is None and torch.promote_types(dtype, bn.running_var.dtype) != dtype


def _frozen_norm(bn: Any, y: Tensor) -> Tensor:
    scale = torch.rsqrt(bn.running_var + bn.eps)
    scale = scale if bn.weight is None else bn.weight * scale
    shift = -bn.running_mean * scale if bn.bias is None else bn.bias - bn.running_mean * scale
    return y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual


def _activate(u: Tensor, activation: str | None, activation_arg: float | None) -> Tensor:
    return activate(u, activation, LEAKY_SLOPE if activation_arg is None else activation_arg)
