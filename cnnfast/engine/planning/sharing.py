"""Which values of a plan share memory: parts of a concatenation with it, and a result with what it is written over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..operators import OPERATORS
from ..plan import Ref, Step
from .propagation import Layouts, references

CONCATENATION = "aten.cat.default"
# Arguments, by position, that an output may be written over, element by element: of the operators that PyTorch does not
# mark as element-wise. A convolution adds its sum onto the residual.
WRITTEN_OVER = {
    "cnnfast.convolution": (3,),
    "cnnfast.affine": (0, 3),
    "cnnfast.sum": (0, 1),
    "aten.hardswish.default": (0,),
}


def concatenate_in_place(layouts: Layouts) -> dict[str, tuple[str, int]]:
    """Moves parts of concatenations to where they belong in them, so that the steps that make them write them there.
    Gives for each such part the concatenation, and where along its dimension the part begins.

    A part is copied, as ever, if it is an input, a constant, a result or a view; if it lies in another concatenation
    or stands twice in this one; and if its dtype is another.
    """
    _build_on_earlier_ones(layouts)
    places: dict[str, tuple[str, int]] = {}
    fixed = {*layouts.inputs, *layouts.results}
    concatenations = [step for step in layouts.steps if step.operator == CONCATENATION]
    for step in concatenations:
        output, names = step.outputs[0], references(step)
        for name, start in starts(layouts, step):
            free = layouts.roots.get(name) == name and name not in fixed and name not in places
            if free and names.count(name) == 1 and layouts.tensors[name].dtype == layouts.tensors[output].dtype:
                places[name] = output, start
    moved: set[str] = set()
    for step in reversed(concatenations):  # one that is itself a part has been moved when its own parts are
        output, (_, dim) = step.outputs[0], step.args
        for name, start in starts(layouts, step):
            if places.get(name) == (output, start):
                size = layouts.tensors[name].shape[dim]
                layouts.tensors[name] = layouts.tensors[output].narrow(dim, start, size)
                layouts.roots[name] = layouts.roots[output]
                moved.add(name)
    for index, step in enumerate(layouts.steps):
        if step.is_view and not moved.isdisjoint(references(step)):
            given: Any = layouts.call(step)
            image = step.outputs[0] in layouts.images
            layouts.steps[index] = layouts.store(step, [given] if isinstance(given, Tensor) else given, image)
            moved.update(step.outputs)
    return places


def starts(layouts: Layouts, step: Step) -> list[tuple[str, int]]:
    """The parts of a concatenation that have elements, and where along its dimension each begins. A part without may
    have one dimension, whatever the others have.
    """
    parts, dim = step.args
    found, start = [], 0
    for ref in parts:
        tensor = layouts.tensor(ref.name)
        if tensor.numel():
            found.append((ref.name, start))
            start += tensor.shape[dim]
    return found


def _build_on_earlier_ones(layouts: Layouts) -> None:
    """Writes the arguments of concatenations in one way, (parts, dimension from the front). Where the first or the last
    parts are all those of an earlier one, that one takes their place: a DenseNet's block concatenates all that it has
    made so far, again and again.
    """
    made: dict[tuple[int, tuple[Ref, ...]], Ref] = {}
    for index, step in enumerate(layouts.steps):
        if step.operator == CONCATENATION:
            given = dict(zip(("tensors", "dim"), step.args, strict=False)) | step.kwargs
            parts, dim = tuple(given["tensors"]), given.get("dim", 0) % layouts.tensors[step.outputs[0]].dim()
            shorter = parts
            for length in range(len(parts), 0, -1):
                if (dim, parts[:length]) in made:
                    shorter = (made[dim, parts[:length]], *parts[length:])
                    break
                if (dim, parts[-length:]) in made:
                    shorter = (*parts[:-length], made[dim, parts[-length:]])
                    break
            made.setdefault((dim, parts), Ref(step.outputs[0]))
            layouts.steps[index] = replace(step, args=(shorter, dim), kwargs={})


def written_over(layouts: Layouts, step: Step) -> list[str]:
    """The values that the output of a step could be written over, element by element, if nothing but this step were to
    read them: the place of the value is the output's, and no other argument lies in the same memory.
    """
    every = range(len(step.args)) if torch.Tag.pointwise in getattr(OPERATORS[step.operator], "tags", ()) else ()
    positions = WRITTEN_OVER.get(step.operator, every)
    arguments = [step.args[position] for position in positions if position < len(step.args)]
    output, names = layouts.tensors[step.outputs[0]], references(step)
    found = []
    for name in dict.fromkeys(argument.name for argument in arguments if isinstance(argument, Ref)):
        root = layouts.roots.get(name)
        alone = names.count(name) == sum(argument == Ref(name) for argument in arguments)
        alone = alone and not any(layouts.roots.get(other) == root for other in names if other != name)
        if root is not None and alone and same_place(layouts.tensors[name], output):
            found.append(name)
    return found


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, at one address, have each element in the same bytes."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=False)
    return (
        one.shape == other.shape and one.dtype == other.dtype and all(n == 1 or mine == its for n, mine, its in strides)
    )
