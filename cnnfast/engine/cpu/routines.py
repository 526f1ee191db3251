"""What computes a step on a CPU, and where its arguments are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..operators import OPERATORS
from ..plan import Plan, Ref, Step, Value

# The tensors of one run: every value, every constant and every place of a plan has its number in this list.
Values = list[Any]


@dataclass(frozen=True)
class Routine:
    """compute(values, out) gives a step's output, or a tuple of them. takes_out: it writes into `out`, which has the
    place and the strides that the plan gives to the output, and returns it. Otherwise it is given None and allocates.
    """

    served_by: str
    compute: Callable[[Values, Any], Any]
    takes_out: bool = False


@dataclass(frozen=True)
class Lookup:
    """The arguments of steps by number, and what is known of them before a run."""

    plan: Plan
    constants: Mapping[str, Tensor]
    numbers: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        places = [piece.place.name for step in self.plan.steps for piece in step.pieces]
        names = dict.fromkeys([*self.plan.values, *self.constants, *places])
        object.__setattr__(self, "numbers", {name: i for i, name in enumerate(names)})

    def number(self, ref: Ref) -> int:
        return self.numbers[ref.name]

    def optional_number(self, ref: Ref | None) -> int | None:
        return None if ref is None else self.numbers[ref.name]

    def constant(self, ref: Any) -> Tensor | None:
        """The tensor behind a constant; None of a value."""
        return self.constants.get(ref.name) if isinstance(ref, Ref) else None

    def is_computed(self, argument: Any) -> bool:
        """Whether an argument is a tensor that only a run gives."""
        return isinstance(argument, Ref) and argument.name not in self.constants

    def output(self, step: Step) -> Value:
        return self.plan.values[step.outputs[0]]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        constant = self.constants.get(ref.name)
        return self.plan.values[ref.name].shape if constant is None else tuple(constant.shape)

    def fill(self, argument: Any) -> Callable[[Values], Any]:
        """A function that gives an argument of a step, with tensors in place of the references in it."""
        if isinstance(argument, Ref):
            number = self.number(argument)
            return lambda values: values[number]
        if isinstance(argument, (list, tuple)) and any(isinstance(part, Ref) for part in argument):
            parts = [self.fill(part) for part in argument]
            return lambda values: [part(values) for part in parts]
        return lambda values: argument


def by_parameter(step: Step) -> dict[str, Any]:
    """The arguments of a step of one of the engine's own operators, by the name of the parameter."""
    return inspect.signature(OPERATORS[step.operator]).bind(*step.args, **step.kwargs).arguments
