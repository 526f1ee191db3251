"""act(bn(conv(x)) + residual) of existing modules, in one step, of which the blocks and the forwards that conversion
writes are made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from cnnfast_kernels.problem import output_extent

from .. import functional
from ..activations import LEAKY_SLOPE, activate
from ..dispatch import why_torch
from ..functional.arguments import autocast
from ..functional.entrance import capture, captured
from .layers import BatchNorm2d, Conv2d, running_statistics

# The dictionaries of a module whose hooks take part in its calls.
HOOKS_OF_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Called with every fused step that a pair of modules takes: see `observed`.
Observer = Callable[[torch.nn.Module, torch.nn.Module, bool, str | None], None]
_observers: tuple[Observer, ...] = ()  # never changed in place: another thread may be going through them
_observing = threading.Lock()  # between reading them and writing others


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """In this context every conv_bn_act of this thread calls `observer(conv, bn, whether there is a residual,
    activation)`, and steps are fused even if PyTorch serves them.
    """
    global _observers
    thread = threading.get_ident()

    def heard(*step: Any) -> None:
        if threading.get_ident() == thread:
            observer(*step)

    with _observing:
        _observers = (*_observers, heard)
    try:
        with capture(lambda *call: nullcontext()):
            yield
    finally:
        with _observing:
            _observers = tuple(other for other in _observers if other is not heard)


def fusable(x: Any, *modules: torch.nn.Module) -> bool:
    """Whether conv_bn_act on `x` may take the place of calls of `modules`: kernels serve it, and no hook or replaced
    forward needs a member's call.
    """
    return served(x) and not why_watched(*modules)


def served(x: Any) -> bool:
    """Whether kernels serve `x`, a 4-D tensor. Also true while calls are captured, so that fused calls are seen even if
    PyTorch serves them.
    """
    return isinstance(x, Tensor) and x.dim() == 4 and (not why_torch(x) or captured())


def why_watched(*modules: torch.nn.Module, members: Sequence[tuple[Sequence[str], type]] = ()) -> str:
    """Why the modules themselves have to be called; the empty string if something may take the place of their calls.

    A module has a hook, or its forward is replaced; hooks of all modules are registered; or a SyncBatchNorm trains.
    members: the path and the class of the modules, or of the first of them, by which the reason names one. The reason
    names others by their class alone.
    """
    if _has_any_global_hook():
        return "hooks of all modules are registered"
    for i, m in enumerate(modules):
        if reason := _why_called(m):
            kind = type(m).__name__
            return f"{'.'.join(members[i][0])} ({kind}) {reason}" if i < len(members) else f"{kind} {reason}"
    return ""


def _why_called(m: torch.nn.Module) -> str:
    if m._forward_hooks:
        return "has a forward hook"
    if m._forward_pre_hooks:
        return "has a forward pre-hook"
    if m._backward_hooks or m._backward_pre_hooks:
        return "has a backward hook"
    if forward_replaced(m):
        return "has a forward that was replaced on the instance"
    if m.training and isinstance(m, torch.nn.SyncBatchNorm):
        return "synchronises its statistics in training"
    return ""


def forward_replaced(module: torch.nn.Module) -> bool:
    """Whether calling `module` runs another forward than its class's.

    A library that wraps a forward and later puts the old one back leaves the class's own forward, bound to the module,
    on the instance: that replaces nothing.
    """
    if "forward" not in module.__dict__:
        return False
    forward = module.__dict__["forward"]
    return (
        getattr(forward, "__self__", None) is not module
        or getattr(forward, "__func__", None) is not type(module).forward
    )


def conv_bn_act(
    conv: torch.nn.Conv2d,
    bn: torch.nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_arg: float | None = None,
) -> Tensor:
    """act(bn(conv(x)) + residual) by the two modules' own parameters and state, without calling them: ask `fusable`
    first.

    conv: any torch.nn.Conv2d. bn: BatchNorm2d, whose rules about buffers, num_batches_tracked and momentum hold;
    SyncBatchNorm in eval; or a frozen norm, which has running_mean, running_var, weight, bias and eps, but no
    track_running_stats. Results have the dtype that the modules called one after the other would give, under autocast
    too: a residual of another dtype, or one that has to be broadcast, is added by PyTorch after the fused convolution
    and norm. activation, activation_arg: as in functional.conv_bn_act.
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
    for observer in _observers:
        observer(conv, bn, residual is not None, activation)
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
    """Whether calling `module` convolves by torch.nn.Conv2d's rules: it is of that class, of ours, or of a subclass
    that computes in the same way.
    """
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
    P, Q = (
        output_extent(x.shape[2 + i], conv.kernel_size[i], conv.stride[i], pads[i], pads[i], conv.dilation[i])
        for i in (0, 1)
    )
    return x.shape[0], conv.out_channels, P, Q


def _promotes(bn: Any, dtype: torch.dtype) -> bool:
    """Whether a frozen norm, which is plain arithmetic of tensors, makes a larger dtype of `dtype`: its parameters may
    be float32 and the image of 16 bits.
    """
    frozen = getattr(bn, "track_running_stats", None) is None
    return frozen and torch.promote_types(dtype, bn.running_var.dtype) != dtype


def _frozen_norm(bn: Any, y: Tensor) -> Tensor:
    scale = torch.rsqrt(bn.running_var + bn.eps)
    scale = scale if bn.weight is None else bn.weight * scale
    shift = -bn.running_mean * scale if bn.bias is None else bn.bias - bn.running_mean * scale
    return y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual


def _activate(u: Tensor, activation: str | None, activation_arg: float | None) -> Tensor:
    return activate(u, activation, LEAKY_SLOPE if activation_arg is None else activation_arg)
