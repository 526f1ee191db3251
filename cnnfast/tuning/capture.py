"""Which convolutions a model makes, forward and backward: one run of it, converted, on tensors that hold nothing."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cnnfast_kernels import launch
from cnnfast_kernels.choosing import Geometry, Question, ask_dgrad, ask_fprop, ask_wgrad

from .. import dispatch
from ..aside import leaving_no_trace
from ..conversion import convert
from ..summary import meta, meta_copy

FORWARD = {"conv_fprop": "", "conv_stats": "stats", "conv_bn_act": "norm"}  # and what the kernel does besides (conv.ask_fprop)
OPERATORS = (*FORWARD, "conv_dgrad", "conv_wgrad")


@dataclass(frozen=True)
class Convolution:
    """One call of an operator of torch.ops.cnnfast: its arguments by name, tensors as launch.Layout."""

    operator: str
    arguments: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments)[name]

    @property
    def dtype(self) -> torch.dtype:
        return next(value.dtype for _, value in self.arguments if isinstance(value, launch.Layout))

    @property
    def geometry(self) -> Geometry:
        return Geometry(self["stride"], self["padding"], self["dilation"], self["groups"])

    @property
    def format(self) -> torch.memory_format:
        """Of a gradient."""
        return torch.channels_last if self["channels_last"] else torch.contiguous_format

    def question(self, tf32: bool, gpu: launch.Gpu) -> Question:
        """What a tile is chosen by, of tensors that start at multiples of 16 bytes, as allocated ones do."""
        how = self.geometry, tf32, gpu, True
        if self.operator == "conv_dgrad":
            return ask_dgrad(self["dy"], self["w"], self["x_shape"], self.format, *how)
        if self.operator == "conv_wgrad":
            return ask_wgrad(self["x"], self["dy"], self["w_shape"], self.format, *how)
        fused = self.operator == "conv_bn_act"
        residual = self["residual"].strides if fused and self["residual"] else None
        activation = self["activation"] if fused else None
        return ask_fprop(self["x"], self["w"], residual, self.geometry, FORWARD[self.operator], activation, tf32, gpu, True)


class _Recorder(TorchDispatchMode):
    """Counts the calls of convolution's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _, _, name = func._schema.name.partition("cnnfast::")
        if name in OPERATORS:
            names = [argument.name for argument in func._schema.arguments]
            self.calls[Convolution(name, tuple(zip(names, map(_described, args), strict=True)))] += 1
        return func(*args, **(kwargs or {}))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return launch.layout(value)
    return tuple(value) if isinstance(value, list | tuple) else value


def capture(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    train: bool,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Counter[Convolution]:
    """The convolutions that our operators would be called with on a GPU, and how often each.

    A copy of the model is converted and run on meta tensors: `model` stays as it is. One that cannot run so, because it branches on
    values, runs as it is if it lies on a GPU. train: with gradients of all that wants one. dtype: casts floating inputs and the copy.
    memory_format: as `convert` takes it; inputs of four axes are laid out likewise.
    Raises RuntimeError if the model does not run on these inputs.
    """

    def run(model: nn.Module, inputs: tuple[Any, ...], *contexts: Any) -> Counter[Convolution]:
        model = convert(model.to(dtype) if dtype else model, inplace=True, memory_format=memory_format).train(train)
        inputs = tree_map_only(Tensor, lambda t: _prepared(t, dtype, memory_format), inputs)
        recorder = _Recorder()
        with ExitStack() as stack:
            for context in (leaving_no_trace(), torch.set_grad_enabled(train), *contexts, recorder):
                stack.enter_context(context)
            outputs = tree_leaves(model(*inputs))
            ends = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
            if train and ends:
                torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
        return recorder.calls

    try:
        return run(meta_copy(model), meta(inputs), dispatch.meta_as_gpu(), torch.device("meta"))
    except Exception as error:
        if not any(t.is_cuda for t in model.parameters()):
            shapes = " ".join("x".join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor))
            raise RuntimeError(f"{type(model).__name__} does not run on {shapes}: {type(error).__name__}: {error}") from error
    return run(copy.deepcopy(model), inputs)


def _prepared(t: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> Tensor:
    t = t.to(dtype) if dtype is not None and t.is_floating_point() else t
    return t if memory_format is None or t.dim() != 4 else t.contiguous(memory_format=memory_format)
