"""The operators that a model calls, forward and backward: it is converted and run once, and no kernel is launched."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

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

# The operators that a forward pass calls; conv_dgrad is that of a transposed convolution.
FORWARD = (
    *(
        "conv_fprop",
        "conv_stats",
        "conv_bn_act",
        "conv_bn_act_words",
        "conv_act",
        "conv_dgrad",
        "gram_statistics",
        "batch_moments",
        "update_running",
        "normalize",
        "normalize_mean",
        "normalize_words",
    ),
    *("normalize_max_pool", "max_pool", "avg_pool", "adaptive_avg_pool", "global_avg_pool"),
)

Recorder = TypeVar("Recorder", bound="CallRecorder")


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator of torch.ops.cnnfast: its arguments by name, with a Layout in place of each tensor."""

    operator: str
    arguments: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments)[name]


class CallRecorder(TorchDispatchMode):
    """Sees the calls of our operators, in their order, and hands each to `record`; of an operator that is composed of
    others, the calls of those.

    model: the converted copy that runs. with_numbers: tensors hold numbers, and PyTorch computes what ours would.
    """

    def __init__(self, model: nn.Module, with_numbers: bool) -> None:
        super().__init__()
        self.model, self.with_numbers = model, with_numbers

    def record(self, call: OperatorCall) -> None:
        """Is told of a call before it is made."""
        raise NotImplementedError

    def others(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a call of an operator of PyTorch's."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _, ours, name = func._schema.name.partition("cnnfast::")
        if not ours:
            return self.others(func, args, kwargs or {})
        arguments = tuple(tuple(a) if isinstance(a, list) else a for a in args)
        if OPERATORS[name].composed:
            with _seeing(self):
                return OPERATORS[name].implementation(*arguments)
        names = [argument.name for argument in func._schema.arguments]
        self.record(OperatorCall(name, tuple(zip(names, map(_described, arguments), strict=True))))
        return _by_pytorch(name, arguments) if self.with_numbers else func(*args)


@contextmanager
def _seeing(recorder: CallRecorder) -> Iterator[None]:
    """The recorder sees what its own handling of a call calls; it is entered once only, whatever else that does."""
    TorchDispatchMode.__enter__(recorder)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(recorder, None, None, None)


class _CallCounter(CallRecorder):
    """Counts equal calls."""

    def __init__(self, model: nn.Module, with_numbers: bool) -> None:
        super().__init__(model, with_numbers)
        self.calls: Counter[OperatorCall] = Counter()

    def record(self, call: OperatorCall) -> None:
        self.calls[call] += 1


def _described(value: Any) -> Any:
    return layout_of(value) if isinstance(value, Tensor) else value


def _by_pytorch(name: str, arguments: tuple[Any, ...]) -> Any:
    """Results that are laid out as the operator's, with the numbers that PyTorch computes. The operators of a backward
    pass give zeros, since no model branches on their values.
    """
    results = OPERATORS[name].fake(*arguments)
    tensors = [t.zero_() for t in tree_leaves(results) if isinstance(t, Tensor)]
    if name in FORWARD:
        for result, numbers in zip(tensors, tree_leaves(getattr(plain, name)(*arguments)), strict=False):
            if result.is_floating_point():  # the positions of maxima are numbered in another way
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
    """The operators that the model would call on a GPU once it is converted, and how often each: see `recorded_run`."""
    how: dict[str, Any] = {"train": train, "dtype": dtype, "memory_format": memory_format}
    return recorded_run(_CallCounter, model, inputs, gpu=gpu, device_type=device_type, **how).calls


def recorded_run(
    recorder: Callable[[nn.Module, bool], Recorder],
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    train: bool,
    gpu: devices.Gpu,
    device_type: str = "cuda",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Recorder:
    """The recorder, made by recorder(the converted copy, with_numbers), that has seen the operators which the model
    would call on a GPU once it is converted, under the settings that are in force (autocast, backend).

    A copy of the model is converted and run on meta tensors. Some cannot run so: those that branch on values, and all
    under autocast, which PyTorch does not apply to meta tensors. These are copied and run where they lie, and PyTorch
    computes what our operators would. The model itself, its gradients and the random numbers stay as they are. If
    DistributedDataParallel or torch.compile has wrapped the model, what they wrap is run: it calls the same operators.

    train: whether the copy is in training mode, and the gradients of all that wants one are computed, too. If the model
    is in that mode already, its members keep the modes that they are in. dtype: floating inputs and the copy are cast
    to it. memory_format: as `convert` takes it; inputs of four axes are laid out likewise. gpu, device_type: as
    devices.meta_stands_for has them. Raises RuntimeError if the model does not run on these inputs.
    """

    def run(model: nn.Module, inputs: tuple[Any, ...], with_numbers: bool) -> Recorder:
        model = convert(model.to(dtype) if dtype else model, inplace=True, memory_format=memory_format)
        model = model if model.training == train else model.train(train)
        inputs = tree_map_only(Tensor, lambda t: _wanting(_prepared(t.detach(), dtype, memory_format), t), inputs)
        recording = recorder(model, with_numbers)
        with leaving_no_trace(), torch.set_grad_enabled(train), recording:
            outputs = tree_leaves(model(*inputs))
            ends = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
            if train and ends:
                torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
        return recording

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
        because = f" under autocast unless all of it is on the {device_type}"
        if reason is not None:
            because = f": {type(reason).__name__}: {reason}"
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
    """As long as the context lasts, this thread takes meta tensors for tensors on this GPU."""
    with ExitStack() as stack:
        stack.enter_context(dispatch.meta_as_gpu())
        stack.enter_context(devices.meta_stands_for(gpu, device_type))
        yield


def replay(call: OperatorCall) -> tuple[tuple[Any, ...], Any]:
    """Runs what the operator would run on a GPU, on meta tensors; returns its arguments and its results. To be called
    within `standing_for`, and where launches are recorded and not made (launch.substituted).
    """
    arguments = tuple(
        torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device="meta")
        if isinstance(value, Layout)
        else value
        for _, value in call.arguments
    )
    return arguments, OPERATORS[call.operator].implementation(*arguments)
