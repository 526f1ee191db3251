"""Single modules: which class of cnnfast.nn takes the place of which of PyTorch's, and why others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .. import nn as cnn
from ..nn.layers import SameConv2d, torch_serves
from ..patterns import FROZEN_NORMS, activation_of
from .grafts import base_of, graft, grafted, own_class, set_class

LEAVES: dict[type, type] = {
    nn.Conv1d: cnn.Conv1d,
    nn.Conv2d: cnn.Conv2d,
    nn.ConvTranspose2d: cnn.ConvTranspose2d,
    nn.BatchNorm1d: cnn.BatchNorm1d,
    nn.BatchNorm2d: cnn.BatchNorm2d,
    nn.BatchNorm3d: cnn.BatchNorm3d,
    nn.SyncBatchNorm: cnn.SyncBatchNorm,
    nn.MaxPool2d: cnn.MaxPool2d,
    nn.AvgPool2d: cnn.AvgPool2d,
    nn.AdaptiveAvgPool2d: cnn.AdaptiveAvgPool2d,
}
ORIGINALS = {ours: theirs for theirs, ours in LEAVES.items()}

# The methods that compute: a subclass that overrides one of them computes something else.
COMPUTING = ("forward", "_conv_forward", "_check_input_dim", "__call__")

# Classes that a report mentions although there is none to take their place.
UNCOVERED = (nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)


def class_name(module: nn.Module) -> str:
    """The full name of a module's own class, without what conversion and parametrizations put on top."""
    cls = base_of(own_class(module))
    return f"{cls.__module__}.{cls.__qualname__}"


def _normalize_and_activate(norm: Any, x: Tensor, normalize: Callable[..., Tensor]) -> Tensor:
    """What timm's layers of a batch norm and an activation compute, in one step where kernels know the activation.
    normalize: the forward of the norm alone.
    """
    act = activation_of(norm.act)
    if act and type(norm.drop) is nn.Identity and cnn.fusable(x, norm.drop, norm.act):
        return cnn.bn_act(norm, x, None, *act)
    return norm.act(norm.drop(normalize(norm, x)))


class _NormAct(cnn.BatchNorm2d):
    """timm's BatchNormAct2d: its children drop and act follow the normalisation."""

    drop: nn.Module
    act: nn.Module

    # timm has another name for the argument
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(x, Tensor):  # torch.fx traces into timm's layer, and shall record timm's own
            return base_of(type(self)).forward(self, x)  # pyright: ignore[reportAttributeAccessIssue]
        return _normalize_and_activate(self, x, cnn.BatchNorm2d.forward)


class _Same(SameConv2d):
    """timm's Conv2dSame."""

    # timm has another name for the argument
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # timm's own also where torch.jit.trace and ONNX record what is computed from sizes
        if torch_serves("conv2d", x, self._parameters.get("weight")):
            return base_of(type(self)).forward(self, x)  # pyright: ignore[reportAttributeAccessIssue]
        return SameConv2d.forward(self, x)


class _SyncNormAct(cnn.SyncBatchNorm):
    """timm's SyncBatchNormAct, which has the children drop and act only where timm's own conversion has made it."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(x, Tensor):
            return base_of(type(self)).forward(self, x)  # pyright: ignore[reportAttributeAccessIssue]
        if {"drop", "act"} <= self._modules.keys():
            return _normalize_and_activate(self, x, cnn.SyncBatchNorm.forward)
        return cnn.SyncBatchNorm.forward(self, x)


# For classes of other libraries that have a forward of their own: a class of ours that computes the same. They are
# known by name, so that no library is imported.
ADAPTERS: dict[str, type] = {
    "timm.layers.norm_act.BatchNormAct2d": _NormAct,
    "timm.layers.norm_act.SyncBatchNormAct": _SyncNormAct,
    "timm.layers.conv2d_same.Conv2dSame": _Same,
}
NORMS = (cnn.BatchNorm1d, cnn.BatchNorm2d, cnn.BatchNorm3d, cnn.SyncBatchNorm)


def normalizes_and_activates(module: nn.Module) -> bool:
    """Whether its children `drop` and `act` belong to what it computes."""
    if type(module).forward is _SyncNormAct.forward:
        return {"drop", "act"} <= module._modules.keys()
    return type(module).forward is _NormAct.forward or class_name(module) == "timm.layers.norm_act.FrozenBatchNormAct2d"


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, (*ORIGINALS, cnn.GlobalAvgPool2d))


def replacement(module: nn.Module) -> type | None:
    """The class that computes the same by our kernels: one of cnnfast.nn, or one grafted on the module's own."""
    cls = own_class(module)
    if is_ours(module) or why_left(module):
        return None
    if cls in LEAVES:
        return LEAVES[cls]
    if adapter := ADAPTERS.get(class_name(module)):
        return _grafted(cls, adapter)
    original = _original(cls)
    return _grafted(cls, LEAVES[original]) if original else None


def swap(module: nn.Module) -> None:
    """Gives `module` its replacement's class, if it has one."""
    if (cls := replacement(module)) is not None:
        set_class(module, cls)


def swap_back(module: nn.Module) -> None:
    """Undoes `swap`. A module that was made as cnnfast.nn's becomes one of torch.nn's too."""
    cls = own_class(module)
    original = ORIGINALS.get(cls, base_of(cls))
    if original is not cls:
        set_class(module, original)


def why_left(module: nn.Module) -> str:
    """Why a convolution, batch norm or pooling of PyTorch's keeps its class. The empty string if it can be replaced,
    and for any other module.
    """
    cls = own_class(module)
    if is_ours(module):
        return ""
    if isinstance(module, LazyModuleMixin):
        becomes: Any = module.cls_to_become  # a lazy batch norm does not inherit from the class that it becomes
        return "not initialised yet: run the model once, then convert it" if _original(becomes or cls) else ""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance" if _original(cls) else ""
    if class_name(module) in FROZEN_NORMS:
        return "frozen: PyTorch's own, unless fused with what stands before or after it"
    if isinstance(module, UNCOVERED):
        return f"there is no kernel for {cls.__name__}"
    original = _original(cls)
    if original is None or class_name(module) in ADAPTERS:
        return ""
    own = [m for m in COMPUTING for c in cls.__mro__[: cls.__mro__.index(original)] if m in c.__dict__]
    return f"{cls.__name__} has its own {own[0]}" if own else ""


def _original(cls: type) -> type | None:
    """The class of PyTorch's in LEAVES that `cls` is or inherits from."""
    return next((c for c in cls.__mro__ if c in LEAVES), None)


def stored_weight(module: Any) -> Tensor:
    """The weight of a convolution as it is stored: its dtype, device and strides are of interest.

    Reading a parametrized weight computes it, and spectral_norm takes each time for a step of its iteration. So of a
    parametrized weight this is the largest of the tensors that it is computed from.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight
    kept = module.parametrizations.weight
    return max([*kept._parameters.values(), *kept._buffers.values()], key=Tensor.numel)


def is_convolution(module: nn.Module | None) -> bool:
    """Whether calling `module` is our convolution over one or two axes and nothing else."""
    kind: Any = type(module)
    if isinstance(module, cnn.Conv1d):
        return (kind.forward, kind._conv_forward) == (cnn.Conv1d.forward, cnn.Conv1d._conv_forward)
    return (
        isinstance(module, cnn.Conv2d)
        and kind.forward in (cnn.Conv2d.forward, _Same.forward)
        and kind._conv_forward is cnn.Conv2d._conv_forward
    )


def is_norm(module: nn.Module) -> bool:
    """Whether calling `module` is a batch norm that may be fused with what stands before or after it, or timm's layer
    of a batch norm and an activation.
    """
    if isinstance(module, NORMS):
        alone = type(module).forward in (cnn.BatchNorm2d.forward, cnn.SyncBatchNorm.forward)
        return alone or normalizes_and_activates(module)
    return class_name(module) in FROZEN_NORMS


def may_follow(norm: nn.Module, conv: nn.Module) -> bool:
    """Whether a norm takes what a convolution returns for a batch."""
    if isinstance(conv, nn.Conv1d):
        return isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm)
    return not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm3d)


def _grafted(base: type, ours: type) -> type:
    """A subclass of `base` that computes as `ours` does."""
    methods = {name: ours.__dict__[name] for name in COMPUTING if name in ours.__dict__}
    return grafted(base, ours, lambda: graft(base, (base, ours), methods, swap, ours))
