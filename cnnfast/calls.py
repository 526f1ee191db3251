"""Which of our operators a model calls, forward and backward: one run of it, converted, in which no kernel is launched."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cnnfast_kernels import devices
from cnnfast_kernels.layout import Layout, layout_of

from . import dispatch
from .aside import leaving_no_trace, meta, meta_copy
from .conversion import convert
from .ops import plain
from .ops.registry import OPERATORS

# Operators that a forward pass calls, conv_dgrad for a transposed convolution.
FORWARD = (
    "conv_fprop", "conv_stats", "conv_bn_act", "conv_dgrad", "batch_moments", "update_running", "normalize", "max_pool", "avg_pool",
    "adaptive_avg_pool", "global_avg_pool",
)  # fmt: skip


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator of torch.ops.cnnfast: its arguments by name, tensors as Layout."""

    operator: str
    arguments: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments)[name]


class _CallRecorder(TorchDispatchMode):
    """Counts the calls of our operators. with_numbers: tensors hold numbers, and PyTorch computes what ours would."""

    def __init__(self, with_numbers: bool) -> None:
        super().__init__()
        self.with_numbers = with_numbers
        self.calls: Counter[OperatorCall] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _, ours, name = func._schema.name.partition("cnnfast::")
        if not ours:
            return func(*args, **(kwargs or {}))
        arguments = tuple(tuple(a) if isinstance(a, list) else a for a in args)
        names = [argument.name for argument in func._schema.arguments]
        self.calls[OperatorCall(name, tuple(zip(names, map(_described, arguments), strict=True)))] += 1
        return _by_pytorch(name, arguments) if self.with_numbers else func(*args)


def _described(value: Any) -> Any:
    return layout_of(value) if isinstance(value, Tensor) else value


def _by_pytorch(name: str, arguments: tuple[Any, ...]) -> Any:
    """Results laid out as the operator's, and their numbers as PyTorch computes them. Of gradients they are zero:
    nobody branches on what a backward pass holds.
    """
    results = OPERATORS[name].fake(*arguments)
    tensors = [t.zero_() for t in tree_leaves(results) if isinstance(t, Tensor)]
    if name in FORWARD:
        for result, numbers in zip(tensors, tree_leaves(getattr(plain, name)(*arguments)), strict=False):
            if result.is_floating_point():  # where a maximum was is written down differently
                result.copy_(numbers)
    return results


def operator_calls(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    train: bool,
    gpu: devices.Gpu,
    device_type: str = "cuda",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Counter[OperatorCall]:
    """The operators that a call of the model would call on a GPU, and how often each: once it is converted, under the
    settings that are in force (autocast, backend).

    A copy of the model is converted and run on meta tensors. One that cannot run so, because it branches on values, and
    any under autocast, which PyTorch does not apply to meta tensors, is copied and run where it lies, with PyTorch
    computing what our operators would. The model itself, its gradients and the random numbers stay as they are. Of one
    that is wrapped by DistributedDataParallel or torch.compile, what they wrap is run: it calls the same operators.

    train: with gradients of all that wants one, the backward pass too; modules are then in training mode, unless the
    model as a whole is already: its members' own modes stay. dtype: casts floating inputs and the copy. memory_format:
    as `convert` takes it; inputs of four axes are laid out likewise. gpu, device_type: as devices.meta_stands_for has
    them. Raises RuntimeError if the model does not run on these inputs.
    """

    def run(model: nn.Module, inputs: tuple[Any, ...], with_numbers: bool) -> Counter[OperatorCall]:
        model = convert(model.to(dtype) if dtype else model, inplace=True, memory_format=memory_format)
        model = model if model.training == train else model.train(train)
        inputs = tree_map_only(Tensor, lambda t: _wanting(_prepared(t.detach(), dtype, memory_format), t), inputs)
        recorder = _CallRecorder(with_numbers)
        with leaving_no_trace(), torch.set_grad_enabled(train), recorder:
            outputs = tree_leaves(model(*inputs))
            ends = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
            if train and ends:
                torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
        return recorder.calls

    model, reason = _unwrapped(model), None
    if not torch.is_autocast_enabled(device_type):
        try:
            with standing_for(gpu, device_type), torch.device("meta"):
                return run(meta_copy(model), tree_map_only(Tensor, lambda t: _wanting(meta(t), t), inputs), False)
        except Exception as error:
            reason = error
    held = [t for t in (*model.parameters(), *model.buffers(), *tree_leaves(inputs)) if isinstance(t, Tensor)]
    if any(t.device.type != device_type for t in held):
        shapes = " ".join("x".join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor))
        because = (
            f": {type(reason).__name__}: {reason}"
            if reason
            else f" under autocast unless all of it is on the {device_type}"
        )
        raise RuntimeError(f"{type(model).__name__} does not run on {shapes}{because}") from reason
    return run(copy.deepcopy(model), tree_map_only(Tensor, lambda t: _wanting(t.detach().clone(), t), inputs), True)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # of torch._dynamo, whose import takes seconds
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


def _wanting(copy: Tensor, original: Tensor) -> Tensor:
    return copy.requires_grad_(original.requires_grad)


def _prepared(t: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> Tensor:
    t = t.to(dtype) if dtype is not None and t.is_floating_point() else t
    return t if memory_format is None or t.dim() != 4 else t.contiguous(memory_format=memory_format)


@contextmanager
def standing_for(gpu: devices.Gpu, device_type: str = "cuda") -> Iterator[None]:
    """Meta tensors are taken for tensors on a GPU while the context lasts, for the whole process."""
    with ExitStack() as stack:
        stack.enter_context(dispatch.meta_as_gpu())
        stack.enter_context(devices.meta_stands_for(gpu, device_type))
        yield


def replay(call: OperatorCall) -> None:
    """Runs what the operator would on a GPU, on meta tensors: within `standing_for` and launch.substituted."""
    arguments = (
        torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device="meta")
        if isinstance(value, Layout)
        else value
        for _, value in call.arguments
    )
    OPERATORS[call.operator].implementation(*arguments)
