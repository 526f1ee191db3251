"""The reference runner: a plan, step by step, in plain PyTorch. Tests of the other runners compare with it, and who
wants to know what a plan means reads it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import OPERATORS
from ..plan import Plan, Value
from .propagation import replaced

POISON = 0xFF  # as bytes of a floating number: NaN


def run(
    plan: Plan, constants: Mapping[str, Tensor], inputs: Sequence[Tensor], *, poison: bool = False
) -> tuple[Tensor, ...]:
    """The results, which belong to the caller, for inputs on the CPU of the shapes and dtypes that the plan is for.

    All values but inputs and results lie in one tensor of bytes, which is allocated in each call. poison: bytes are NaN
    wherever no value is alive, so that what is read too early, too late or in a wrong place shows in the results.
    """
    arena = torch.empty(plan.arena, dtype=torch.uint8)
    memory = {
        name: torch.empty(buffer.bytes, dtype=torch.uint8)
        if buffer.address is None
        else arena[buffer.address : buffer.address + buffer.bytes]
        for name, buffer in plan.buffers.items()
    }

    def view(value: Value) -> Tensor:
        typed = memory[value.buffer].view(value.dtype)
        return typed.as_strided(value.shape, value.stride, typed.storage_offset() + value.offset)

    tensors = {**constants, **{name: view(value) for name, value in plan.values.items()}}
    ended: dict[int, list[Tensor]] = {}
    for name, buffer in plan.buffers.items():
        ended.setdefault(buffer.last, []).append(memory[name])
        if poison:
            memory[name].fill_(POISON)
    for name, tensor in zip(plan.inputs, inputs, strict=True):
        tensors[name].copy_(tensor)
    with torch.inference_mode():
        for index, step in enumerate(plan.steps):
            if step.pieces:
                for piece in step.pieces:
                    view(piece.place).copy_(tensors[piece.part])
            elif not step.is_view:
                args, kwargs = replaced((step.args, step.kwargs), lambda ref: tensors[ref.name])
                given: Any = OPERATORS[step.operator](*args, **kwargs)
                for name, tensor in zip(step.outputs, [given] if isinstance(given, Tensor) else given, strict=True):
                    tensors[name].copy_(tensor)
            if poison:
                for bytes_ in ended.get(index, ()):
                    bytes_.fill_(POISON)
    return tuple(tensors[name] for name in plan.results)
