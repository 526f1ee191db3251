"""How many kernels an augmentation launches, and how many bytes they read and write, without a GPU.

What PyTorch launches is counted by its operators: on a GPU each launches one kernel or more, unless it makes a view of
memory that is there. Only operators count that read or write a tensor as large as an image of the result, because the
small tensors of random numbers may lie on the CPU. So that is a lower bound. What ours launch is replayed on meta
tensors that stand for a GPU's: that is exact, but for the copy of the numbers to the GPU, which is no kernel. Of each
the bytes are those of all its tensors (moved_bytes.py): images count whole, though a crop reads a part of them, and
what a cache saves is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import dispatch, moved_bytes
from ..aside import leaving_no_trace
from ..ops.registry import OPERATORS

STEPS = 4  # that are counted: how much is done depends on what is drawn


class Count(NamedTuple):
    """Of one step: launches, and bytes that they read and write."""

    launches: float
    moved_bytes: float


class OperatorTally(TorchDispatchMode):
    """Counts operators that read or write a tensor of at least `least` elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.launches, self.moved_bytes = least, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cnnfast":  # made of PyTorch's operators, which count, where no kernel serves
            backend = torch._C.DispatchKey.CUDA if args[0].is_cuda else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(backend), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        moved = moved_bytes.by_operator(func, args, kwargs or {}, result)
        if moved is not None and max(t.numel() for t in (*moved.read, *moved.written)) >= self.least:
            self.launches += 1
            self.moved_bytes += moved.bytes
        return result


def by_operators(step: Callable[[], object], least: int) -> Count:
    """Counts the operators of a few steps. Random numbers are afterwards as they were."""
    with leaving_no_trace(), OperatorTally(least) as tally:
        torch.manual_seed(0)
        for _ in range(STEPS):
            step()
    return Count(tally.launches / STEPS, tally.moved_bytes / STEPS)


class Replaying(TorchDispatchMode):
    """Operators of cnnfast do on meta tensors what they would do on a GPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _, ours, name = func._schema.name.partition("cnnfast::")
        if not ours:
            return func(*args, **(kwargs or {}))
        # what the dispatcher hands over as lists is hashable where functions call (ops/registry.py)
        arguments = tuple(tuple(a) if type(a) is list else a for a in args)
        with self if OPERATORS[name].composed else nullcontext():  # which calls others
            return OPERATORS[name].implementation(*arguments)


def by_replaying(call: Callable[[], object]) -> Count | None:
    """Counts what a call on meta tensors would launch if these were on a GPU; None without triton."""
    if dispatch.launch is None:
        return None
    from cnnfast_kernels import devices

    from .. import calls

    moved: list[int] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        moved.append(moved_bytes.by_launch(arguments))

    with leaving_no_trace(), dispatch.backend("auto"), calls.standing_for(devices.NO_GPU), ExitStack() as stack:
        stack.enter_context(dispatch.launch.substituted(note))
        stack.enter_context(Replaying())
        call()
    return Count(len(moved), sum(moved))
