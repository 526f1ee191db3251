"""Finds the calls to check: runs a model or function once and keeps every covered call with the values of its
arguments.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .. import dispatch, functional
from ..aside import leaving_no_trace
from ..functional import entrance
from ..functional.arguments import Sides
from ..functional.convolution import padded_for_torch

OPERATIONS = (
    "conv1d",
    "conv2d",
    "conv_transpose2d",
    "conv_bn_act",
    "conv_act",
    "bn_act",
    "batch_norm",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "global_avg_pool2d",
)
SIGNATURES = {name: inspect.signature(getattr(functional, name)) for name in OPERATIONS}

# PyTorch's own functions that a plain model calls.
TORCH_FUNCTIONS = {
    getattr(torch.nn.functional, name): name
    for name in (*(name for name in OPERATIONS if hasattr(torch.nn.functional, name)), "max_pool2d_with_indices")
}


@dataclass
class Captured:
    """One call: the operation of cnnfast.functional, and its arguments by name, tensors as they were before the call.

    Plain data throughout. `layer` is the module that owns its parameters; `autocast` the dtype of torch.autocast, if
    that was on.
    """

    operation: str
    arguments: dict[str, Any]
    layer: str = ""
    autocast: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.arguments["input"].device

    @property
    def dtype(self) -> torch.dtype:
        """That of the output."""
        return self.autocast or self.arguments["input"].dtype

    @property
    def training(self) -> bool:
        return bool(self.arguments.get("training"))

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def computing(self) -> Any:
        """A context manager: autocast as it was during the call."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()


def clone(t: Tensor) -> Tensor:
    """A copy with the same strides, whatever they are: it copies the memory from the first element to the last."""
    t = t.detach()
    if t.numel() == 0:
        return t.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).clone().as_strided(t.shape, t.stride())


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return clone(value)
    return tuple(value) if isinstance(value, list | torch.Size) else value


def for_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as PyTorch's own function takes them."""
    given = {name: value for name, value in arguments.items() if name != "algorithm"}
    if isinstance(given.get("padding"), Sides):
        given["input"], given["padding"] = padded_for_torch(given["input"], given["padding"])
    return given


class _CheckRecorder(TorchFunctionMode):
    """Records the calls of both libraries, but none that are made inside a call that is recorded already."""

    def __init__(self, owners: dict[int, str]) -> None:
        super().__init__()
        self.calls: list[Captured] = []
        self.owners = owners
        self.inside = False

    def record(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            bound = SIGNATURES[operation].bind(*args, **kwargs)
        except TypeError:  # the call itself will say what is wrong
            return
        bound.apply_defaults()
        if not isinstance(bound.arguments.get("input"), Tensor):
            return
        layer = next((self.owners[id(a)] for a in bound.arguments.values() if id(a) in self.owners), "")
        device = bound.arguments["input"].device.type
        casts = (
            operation.startswith("conv")
            and torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
        )
        autocast = (
            torch.get_autocast_dtype(device) if casts and bound.arguments["input"].dtype != torch.float64 else None
        )
        # a synchronised norm is judged by its own part of the batch, as one process computes it
        arguments = {name: _plain(value) for name, value in bound.arguments.items() if name != "process_group"}
        self.calls.append(Captured(operation, arguments, layer, autocast))

    @contextmanager
    def ours(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        if not self.inside:
            self.record(operation, args, kwargs)
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = None if self.inside else TORCH_FUNCTIONS.get(func) if isinstance(func, Callable) else None
        if name == "max_pool2d_with_indices":
            self.record("max_pool2d", args, {**kwargs, "return_indices": True})
        elif name:
            self.record(name, args, kwargs)
        return func(*args, **kwargs)


def capture_calls(
    target: Callable[..., Any], inputs: tuple[Any, ...], dtype: torch.dtype | None = None
) -> list[Captured]:
    """Runs `target` on copies of `inputs`, without gradients, and returns its covered calls in order.

    A module is copied first and keeps its mode; its buffers and PyTorch's random numbers are afterwards as they were.
    `dtype` casts floating inputs and the copy of the module. A compiled model runs uncompiled. PyTorch serves every
    call, so that no fault of a kernel reaches the arguments of the next.
    """
    owners: dict[int, str] = {}
    if isinstance(target, torch.nn.Module):
        target = copy.deepcopy(target)
        if dtype is not None:
            target = target.to(dtype)
        for name, t in [*target.named_parameters(), *target.named_buffers()]:
            owners.setdefault(id(t), name.rpartition(".")[0])

    def prepare(t: Tensor) -> Tensor:
        return t.detach().to(dtype) if dtype is not None and t.is_floating_point() and t.dtype != dtype else clone(t)

    inputs = tree_map_only(Tensor, prepare, inputs)
    recorder = _CheckRecorder(owners)
    with (
        leaving_no_trace(),
        torch.no_grad(),
        dispatch.in_this_thread("torch"),
        entrance.capture(recorder.ours),
        recorder,
    ):
        target(*inputs)
    return recorder.calls
