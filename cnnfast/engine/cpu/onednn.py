"""Runs a plan by PyTorch's operators alone: convolutions and matrix products by oneDNN, which comes with PyTorch on
most machines, with packed weights and fused activations, and by plain operators where it does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..plan import Plan, Step
from ..runner import Runner
from . import memory
from .actions import actions
from .convolutions import convolution
from .elementwise import affine, by_pytorch, sum_of
from .memory import given_memory, laid_out, place
from .parts import in_parts_if_large
from .products import linear
from .routines import Lookup, Routine, Values

PROFILE_ROUNDS = 5


def supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes convolutions in a dtype on this machine. Where not, plain PyTorch does."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    asked: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in asked and bool(asked[dtype]())


def build(plan: Plan, constants: Mapping[str, Tensor]) -> Runner:
    """A runner of a plan. constants: tensors, by the names that the plan has for them."""
    return OneDnnRunner(plan, constants)


def routine_for(step: Step, lookup: Lookup) -> Routine | None:
    """How a step is computed; None where there is nothing to compute, or only to copy."""
    if step.is_view or step.pieces:
        return None
    onednn = supports(lookup.output(step).dtype)
    match step.operator:
        case "cnnfast.convolution":
            return in_parts_if_large(convolution)(step, lookup, onednn)
        case "cnnfast.linear":
            return in_parts_if_large(linear)(step, lookup, onednn)
        case "cnnfast.affine":
            return affine(step, lookup)
        case "cnnfast.sum":
            return sum_of(step, lookup)
    return by_pytorch(step, lookup)


class OneDnnRunner:
    """The tensors of a run are in a list, by number. Constants are in it from the beginning, and so are the values that
    lie in given memory; the steps that allocate add the others. An idle list, with an arena of its own, waits for the
    next call: as many are made as there are calls at one time.
    """

    def __init__(self, plan: Plan, constants: Mapping[str, Tensor]) -> None:
        self._plan = plan
        self._lookup = lookup = Lookup(plan, constants)
        with torch.inference_mode():
            routines = [routine_for(step, lookup) for step in plan.steps]
        self._served_by = {step.name: _name(step, routine) for step, routine in zip(plan.steps, routines, strict=True)}
        by_onednn = any("oneDNN" in name for name in self._served_by.values())
        self.name = "oneDNN" if by_onednn else "PyTorch"
        self._given = given_memory(plan, routines)
        self._results = {name for name in self._given if plan.buffers[name].address is None}
        self._actions = tuple(actions(lookup, routines, self._given))
        self._inputs = tuple((lookup.numbers[name], plan.values[name]) for name in plan.inputs)
        self._idle: list[Values] = []

    def served_by(self) -> dict[str, str]:
        return dict(self._served_by)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._call(inputs, self._run)

    def profile(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        """Seconds of each step: the median of a few rounds."""
        seconds: dict[str, list[float]] = {step.name: [] for step in self._plan.steps}
        for _ in range(PROFILE_ROUNDS):
            self._call(inputs, lambda values: self._run_timed(values, seconds))
        return {name: statistics.median(times) if times else 0.0 for name, times in seconds.items()}

    def _run(self, values: Values) -> None:
        for action in self._actions:
            action.run(values)
            for number in action.finished:
                values[number] = None

    def _run_timed(self, values: Values, seconds: dict[str, list[float]]) -> None:
        for action in self._actions:
            began = time.perf_counter()
            action.run(values)
            seconds[action.step].append(time.perf_counter() - began)
            for number in action.finished:
                values[number] = None

    def _call(self, inputs: Sequence[Tensor], run: Callable[[Values], None]) -> tuple[Tensor, ...]:
        try:
            idle = self._idle.pop()
        except IndexError:
            idle = self._new_values()
        values = idle.copy()
        for (number, value), x in zip(self._inputs, inputs, strict=True):
            values[number] = laid_out(x, value)
        for name in self._results:
            place(values, self._given[name], self._lookup.numbers, memory.allocate(self._plan.buffers[name].bytes))
        with torch.inference_mode():
            run(values)
        self._idle.append(idle)
        return tuple(values[self._lookup.numbers[name]] for name in self._plan.results)

    def _new_values(self) -> Values:
        """The list of values before a run, with a new arena."""
        plan, numbers = self._plan, self._lookup.numbers
        values: Values = [None] * len(numbers)
        for name, constant in self._lookup.constants.items():
            values[numbers[name]] = constant
        arena = memory.allocate(plan.arena)
        for name in self._given.keys() - self._results:
            buffer = plan.buffers[name]
            assert buffer.address is not None
            place(values, self._given[name], numbers, arena[buffer.address : buffer.address + buffer.bytes])
        return values


def _name(step: Step, routine: Routine | None) -> str:
    if routine is not None:
        return routine.served_by
    return "view" if step.is_view else "PyTorch (copy)"
