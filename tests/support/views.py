"""How a tensor may lie in memory, drawn at random: axes in any order, every second element, cut out of NaN, repeated
without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.support.poison import poison


@dataclass(frozen=True, slots=True)
class View:
    """`order`: axes from the one with the largest stride to the one with the least. Each axis takes every `steps`-th
    element of a larger tensor, whose others are NaN, `margin` of them before and after; a `repeated` axis has a stride
    of 0.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    margin: int
    repeated: tuple[bool, ...]

    @property
    def kind(self) -> str:
        """In a word, for counting."""
        if any(self.repeated):
            return "repeated"
        if max(self.steps) > 1:
            return "every second"
        axes = len(self.order)
        order = {channels_last(axes): "channels_last", tuple(range(axes)): "contiguous"}.get(self.order, "permuted")
        return f"{order} slice" if self.margin else order


def channels_last(axes: int) -> tuple[int, ...]:
    return (0, *range(2, axes), 1) if axes > 2 else tuple(range(axes))


@st.composite
def views(draw: st.DrawFn, axes: int, repeated: bool = True) -> View:
    """Of a tensor of so many axes. Half are in one of the two usual orders. `repeated`: the last axis may be, too."""
    usual = [tuple(range(axes)), channels_last(axes)]
    order = draw(st.one_of(st.sampled_from(usual), st.permutations(range(axes)).map(tuple)))
    each = st.sampled_from([1, 1, 1, 2])
    steps = draw(st.one_of(st.just((1,) * axes), st.tuples(*[each] * axes)))
    again = st.tuples(*[st.sampled_from([False, False, True])] * (axes if repeated else axes - 1))
    some = draw(st.one_of(st.just((False,) * axes), st.just((False,) * axes), again))
    return View(order, steps, draw(st.integers(0, 1)), (*some, *[False] * (axes - len(some))))


def lay(t: torch.Tensor, view: View) -> torch.Tensor:
    """A copy of `t` that lies so; along repeated axes its first element stands for all."""
    first = t[tuple(slice(0, 1) if again else slice(None) for again in view.repeated)].permute(view.order)
    steps = [view.steps[axis] for axis in view.order]
    whole = poison(t.new_empty([2 * view.margin + size * step for size, step in zip(first.shape, steps, strict=True)]))
    cut = whole[
        tuple(slice(view.margin, view.margin + n * step, step) for n, step in zip(first.shape, steps, strict=True))
    ]
    cut.copy_(first)
    return cut.permute([view.order.index(axis) for axis in range(t.dim())]).expand(t.shape)
