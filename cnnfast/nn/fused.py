"""act(bn(conv(x)) + residual) of existing modules, in one step, and the same without the convolution or without the
norm. Of these the blocks and the forwards that conversion writes are made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from ..activations import ActivationName
from ..dispatch import why_torch
from ..functional.entrance import capture, captured
from .layers import BatchNorm2d, Conv2d, SyncBatchNorm, running_statistics, synchronising_group
from .operands import operands
from .rest import Rest, Slope, split

# The dictionaries of a module whose hooks take part in its calls.
HOOKS_OF_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Called with every fused step that modules take: see `observed`.
Observer = Callable[[tuple[torch.nn.Module, ...], bool, str | None], None]
_observers: tuple[Observer, ...] = ()  # never changed in place: another thread may be going through them
_observing = threading.Lock()  # between reading them and writing others


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """In this context every conv_bn_act, conv_act and bn_act of this thread calls `observer(modules, whether there is a
    residual, activation)`, of the convolution and the norm that it has, and steps are fused even if PyTorch serves
    them.
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
    """Whether conv_bn_act on `x` [N, C, H, W] may take the place of calls of `modules`: kernels serve it, and no hook
    or replaced forward needs a member's call.
    """
    return served(x) and x.dim() == 4 and not why_watched(*modules)


def served(x: Any) -> bool:
    """Whether kernels serve a tensor. Also true while calls are captured, so that fused calls are seen even if PyTorch
    serves them.
    """
    return isinstance(x, Tensor) and (not why_torch(x) or captured())


def takes(module: torch.nn.Module, x: Any) -> bool:
    """Whether conv_bn_act and conv_act, if `module` is a convolution, or bn_act, if it is a norm, compute what calling
    `module` on `x` would: an unbatched image goes to the convolution itself, and so do inputs that PyTorch refuses.
    """
    return isinstance(x, Tensor) and x.dim() in _dimensions(module)


def _dimensions(module: torch.nn.Module) -> tuple[int, ...]:
    if isinstance(module, torch.nn.BatchNorm1d):
        return (2, 3)
    if isinstance(module, torch.nn.SyncBatchNorm):
        return (2, 3, 4, 5)
    return (3,) if isinstance(module, torch.nn.Conv1d) else (5,) if isinstance(module, torch.nn.BatchNorm3d) else (4,)


def why_watched(*modules: torch.nn.Module, members: Sequence[tuple[Sequence[str], type]] = ()) -> str:
    """Why the modules themselves have to be called; the empty string if something may take the place of their calls.

    A module has a hook, or its forward is replaced; hooks of all modules are registered; or PyTorch's own SyncBatchNorm
    trains, whose other processes may call it. members: the path and the class of the modules, or of the first of them,
    by which the reason names one. The reason names others by their class alone.
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
    if m.training and isinstance(m, torch.nn.SyncBatchNorm) and not isinstance(m, SyncBatchNorm):
        return "synchronises its statistics in training by PyTorch's own code: it is not converted"
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
    conv: torch.nn.Conv2d | torch.nn.Conv1d,
    bn: torch.nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    activation: ActivationName | None = None,
    activation_arg: Slope = None,
) -> Tensor:
    """act(bn(conv(x)) + residual) by the two modules' own parameters and state, without calling them: ask `fusable`
    first.

    conv: any torch.nn.Conv2d and x [N, C, H, W], or any Conv1d and x [N, C, L]. bn: BatchNorm2d, or BatchNorm1d after a
    Conv1d, whose rules about buffers, num_batches_tracked and momentum hold; SyncBatchNorm, in training ours; or a
    frozen norm, which has running_mean, running_var, weight, bias and eps, but no track_running_stats. Results have the
    dtype that the modules called one after the other would give, under autocast too: a residual of another dtype, or
    one that has to be broadcast, is added by PyTorch after the fused convolution and norm. activation, activation_arg:
    as in functional.conv_bn_act; prelu, whose activation_arg is its parameter, is PyTorch's where gradients are
    recorded. Raises what `conv` and functional.conv_bn_act raise.
    """
    images, rest = operands(conv, x), Rest(residual, activation, activation_arg)
    if _promotes(bn, images.x.dtype):
        y = functional.conv2d(*images.of_convolution)
        return rest(_frozen_norm(bn, images.result(y)))
    now, later = split(rest, images.output_size, images.x, (conv, bn), images.rows)
    _tell((conv, bn), rest, later)
    mean, var, training, momentum = running_statistics(bn)
    y = functional.conv_bn_act(
        images.x,
        images.weight,
        mean,
        var,
        bn.weight,  # pyright: ignore[reportArgumentType]
        bn.bias,  # pyright: ignore[reportArgumentType]
        bias=images.bias,
        residual=now.residual,
        activation=now.activation,
        activation_arg=now.activation_arg,
        training=training,
        momentum=momentum,
        eps=bn.eps,  # pyright: ignore[reportArgumentType]
        stride=images.stride,
        padding=images.padding,
        dilation=images.dilation,
        groups=images.groups,
        process_group=synchronising_group(bn, x),
    )
    return later(images.result(y))


def conv_act(
    conv: torch.nn.Conv2d | torch.nn.Conv1d,
    x: Tensor,
    residual: Tensor | None = None,
    activation: ActivationName | None = None,
    activation_arg: Slope = None,
) -> Tensor:
    """act(conv(x) + residual) by the module's own parameters, without calling it. Everything is as conv_bn_act has
    it.
    """
    images, rest = operands(conv, x), Rest(residual, activation, activation_arg)
    now, later = split(rest, images.output_size, images.x, (conv,), images.rows)
    _tell((conv,), rest, later)
    y = functional.conv_act(
        *images.of_convolution,
        residual=now.residual,
        activation=now.activation,
        activation_arg=now.activation_arg,
    )
    return later(images.result(y))


def bn_act(
    bn: torch.nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    activation: ActivationName | None = None,
    activation_arg: Slope = None,
) -> Tensor:
    """act(bn(x) + residual) by the norm's own parameters and state, without calling it.

    bn: a norm as conv_bn_act takes, or BatchNorm1d of [N, C] or [N, C, L], or BatchNorm3d of [N, C, D, H, W]. The
    result has x's dtype, under autocast too, unless the residual makes a larger one of it. Everything else is as
    conv_bn_act has it.
    """
    rest = Rest(residual, activation, activation_arg)
    if _promotes(bn, x.dtype):
        return rest(_frozen_norm(bn, x))
    now, later = split(rest, x.shape, x, (bn,))
    _tell((bn,), rest, later)
    mean, var, training, momentum = running_statistics(bn)
    y = functional.bn_act(
        x,
        mean,
        var,
        bn.weight,  # pyright: ignore[reportArgumentType]
        bn.bias,  # pyright: ignore[reportArgumentType]
        training,
        momentum,
        bn.eps,  # pyright: ignore[reportArgumentType]
        residual=now.residual,
        activation=now.activation,
        activation_arg=now.activation_arg,
        process_group=synchronising_group(bn, x),
    )
    return later(y)


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
        forwards = (norm.forward for norm in (torch.nn.BatchNorm2d, BatchNorm2d, torch.nn.SyncBatchNorm, SyncBatchNorm))
        return kind.forward in forwards
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"


def _tell(modules: tuple[torch.nn.Module, ...], rest: Rest, later: Rest) -> None:
    """Tells the observers of a step. A residual that PyTorch adds after it is its residual all the same."""
    for observer in _observers:
        observer(modules, rest.residual is not None, None if later.activation == "prelu" else rest.activation)


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
