"""The steps of a plan as a list of functions: each computes its outputs and puts them where they belong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..plan import Plan, Step
from ..planning.propagation import references
from .elementwise import by_pytorch
from .routines import Lookup, Routine, Values


@dataclass(frozen=True)
class Action:
    """finished: numbers of values that nothing reads afterwards, and whose memory an operator has allocated."""

    step: str
    run: Callable[[Values], None]
    finished: tuple[int, ...]


def actions(lookup: Lookup, routines: Sequence[Routine | None], given: Collection[str]) -> Iterator[Action]:
    """One for each step that has anything to do. given: names of the buffers of which all values lie in given memory
    (memory.py), before the first step.
    """
    plan = lookup.plan
    finished: dict[int, list[int]] = {}
    for name, index in _last_uses(plan).items():
        if name in plan.values and name not in plan.results and plan.values[name].buffer not in given:
            finished.setdefault(index, []).append(lookup.numbers[name])
    for index, (step, routine) in enumerate(zip(plan.steps, routines, strict=True)):
        run = _run(lookup, step, routine, given)
        if run is not None:
            yield Action(step.name, run, tuple(finished.get(index, ())))


def _last_uses(plan: Plan) -> dict[str, int]:
    """The index of the last step that reads or writes each value."""
    last = {}
    for index, step in enumerate(plan.steps):
        for name in (*step.outputs, *references(step), *(piece.part for piece in step.pieces)):
            last[name] = index
    return last


def _run(
    lookup: Lookup, step: Step, routine: Routine | None, given: Collection[str]
) -> Callable[[Values], None] | None:
    plan = lookup.plan
    buffers = {plan.values[name].buffer for name in step.outputs}
    outputs = [lookup.numbers[name] for name in step.outputs]
    if step.pieces:
        return _copy_pieces([(lookup.numbers[p.part], lookup.numbers[p.place.name]) for p in step.pieces])
    if routine is None:
        return None if buffers <= set(given) else _keep(by_pytorch(step, lookup).compute, outputs)
    if routine.takes_out:
        return _write(routine.compute, lookup.numbers[step.overwrites or step.outputs[0]], outputs[0])
    if buffers <= set(given):
        return _copy(routine.compute, outputs)
    belongs_to_caller = any(plan.buffers[name].address is None for name in buffers)
    return _keep(_outside_inference_mode(routine.compute) if belongs_to_caller else routine.compute, outputs)


def _copy_pieces(moves: Sequence[tuple[int, int]]) -> Callable[[Values], None]:
    """Copies the parts of a concatenation that do not lie in it yet."""

    def run(values: Values) -> None:
        for part, place in moves:
            values[place].copy_(values[part])

    return run


def _write(compute: Callable[[Values, Any], Any], written: int, output: int) -> Callable[[Values], None]:
    """Has an output written into memory that is there: its own, or that of a value which ends here."""

    def run(values: Values) -> None:
        values[output] = compute(values, values[written])

    return run


def _copy(compute: Callable[[Values, Any], Any], outputs: Sequence[int]) -> Callable[[Values], None]:
    """Copies what an operator has allocated to where the plan wants it."""
    several = len(outputs) > 1

    def run(values: Values) -> None:
        computed = compute(values, None)
        for number, tensor in zip(outputs, computed if several else (computed,), strict=True):
            values[number].copy_(tensor)

    return run


def _keep(compute: Callable[[Values, Any], Any], outputs: Sequence[int]) -> Callable[[Values], None]:
    """Takes what an operator has allocated."""
    (output, *others) = outputs

    def run(values: Values) -> None:
        values[output] = compute(values, None)

    def run_several(values: Values) -> None:
        for number, tensor in zip(outputs, compute(values, None), strict=True):
            values[number] = tensor

    return run_several if others else run


def _outside_inference_mode(compute: Callable[[Values, Any], Any]) -> Callable[[Values, Any], Any]:
    """Computes what the caller may write into: PyTorch forbids that for tensors which inference mode has made."""

    def compute_for_caller(values: Values, out: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return compute(values, out)

    return compute_for_caller
