"""Results too large for the memory that allocators keep: a few images at a time, into the arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..plan import Step
from .routines import Lookup, Routine, Values, by_parameter

# glibc gives blocks of more than 32 MiB back to the system as soon as they are free, and every page of the next one is
# a fault: for a fast step that takes several times as long as computing the result in parts and copying them.
LARGEST_KEPT = 32 << 20
# Bytes of a part, as long as it has more than one image: it is copied while it is in the cache.
PART = 8 << 20

Make = Callable[[Step, Lookup, bool], Routine]


def in_parts_if_large(make: Make) -> Make:
    """What makes the routine of a convolution or a product, or the same for a part of the images at a time."""

    def make_either(step: Step, lookup: Lookup, onednn: bool) -> Routine:
        output = lookup.output(step)
        images = output.shape[0] if len(output.shape) > 1 else 1
        allocated_anyway = lookup.plan.buffers[output.buffer].address is None
        if output.bytes <= LARGEST_KEPT or images == 1 or allocated_anyway:
            return make(step, lookup, onednn)
        return _in_parts(make, step, lookup, onednn)

    return make_either


def _in_parts(make: Make, step: Step, lookup: Lookup, onednn: bool) -> Routine:
    output = lookup.output(step)
    images = output.shape[0]
    size = max(1, PART * images // output.bytes)
    given = by_parameter(step)
    cut = [given[name].name for name in ("x", "residual") if given.get(name) is not None]
    values = lookup.plan.values
    smaller = {name: replace(values[name], shape=(size, *values[name].shape[1:])) for name in (*cut, *step.outputs)}
    part_of_plan = replace(lookup.plan, values=values | smaller)
    routine = make(replace(step, overwrites=""), Lookup(part_of_plan, lookup.constants), onednn)
    numbers = [lookup.numbers[name] for name in cut]

    def compute(values: Values, out: Tensor) -> Tensor:
        part = values.copy()
        for first in range(0, images, size):
            images_of_part = slice(first, first + size)
            for number in numbers:
                part[number] = values[number][images_of_part]
            out[images_of_part].copy_(routine.compute(part, None))
        return out

    return Routine(f"{routine.served_by}, in parts", compute, takes_out=True)
