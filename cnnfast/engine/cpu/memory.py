"""Where values of a run lie: in memory given to the steps that write them, or in what operators allocate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import Plan, Value
from .routines import Routine, Values

_CONCATENATION = "aten.cat.default"


def allocate(bytes: int) -> Tensor:
    return torch.empty(bytes, dtype=torch.uint8)


def given_memory(plan: Plan, routines: Sequence[Routine | None]) -> dict[str, list[Value]]:
    """The buffers that lie in the arena, or are allocated for the caller before a run, each with all values in it. They
    are those that hold a concatenation, whose parts are written by several steps, and those that begin with a step that
    writes into given memory. The other buffers are whatever their first step allocates.
    """
    given = set()
    for step, routine in zip(plan.steps, routines, strict=True):
        begins = routine is not None and routine.takes_out and not step.overwrites
        if begins or step.operator == _CONCATENATION:
            given |= {plan.values[name].buffer for name in step.outputs}
    inside: dict[str, list[Value]] = {name: [] for name in given}
    pieces = [piece.place for step in plan.steps for piece in step.pieces]
    for value in [*plan.values.values(), *pieces]:
        if value.buffer in inside:
            inside[value.buffer].append(value)
    return inside


def place(values: Values, inside: Sequence[Value], numbers: dict[str, int], memory: Tensor) -> None:
    """Puts views of a buffer's memory, of dtype uint8, into the list of values."""
    for value in inside:
        whole = memory[: memory.numel() // value.dtype.itemsize * value.dtype.itemsize].view(value.dtype)
        values[numbers[value.name]] = whole.as_strided(value.shape, value.stride, whole.storage_offset() + value.offset)


def laid_out(x: Tensor, value: Value) -> Tensor:
    """An input, with the strides that the plan expects of it."""
    if x.shape != value.shape or x.dtype != value.dtype:
        raise ValueError(
            f"input {value.name}: this plan is for a tensor of shape {value.shape} and {value.dtype}, got "
            f"{tuple(x.shape)} and {x.dtype}"
        )
    if x.stride() == value.stride:
        return x
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype).copy_(x)
