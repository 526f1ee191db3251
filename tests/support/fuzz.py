"""Random calls of every operation whose results are known to the last bit.

Operands are small integers, or small integers times what will be divided by, so that every sum is exact in the
accumulator's dtype, in any order: results and gradients must then be float64's, rounded once. Statistics of a batch
norm are exact where var + eps is a power of four, and a tile's mean where neighbours along a row lie evenly around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as theirs
from hypothesis import strategies as st
from torch import Tensor

import cnnfast.functional as ours
from cnnfast.dispatch import backend
from cnnfast.recording import Trace
from cnnfast_kernels.dtypes import accumulator_dtype
from tests.support.agreement import integers, run
from tests.support.views import View, lay, views

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Up to here integers are exact.
CAPACITY = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}
ALGORITHMS = ("auto", "direct", "im2col")


@dataclass(frozen=True)
class Case:
    """One call: the shapes of its inputs, None where absent; how each of them lies in memory, and last how the gradient
    of the result does, which is `dy_step` times small integers; which inputs are `frozen`, that is ask for no gradient.
    """

    shapes: tuple[tuple[int, ...] | None, ...]
    views: tuple[View, ...]
    dtype: torch.dtype
    options: dict[str, Any]
    dtypes: tuple[torch.dtype, ...] = ()  # of the inputs, where they are not all `dtype`
    frozen: tuple[int, ...] = ()
    dy_step: int = 1
    branches: tuple[str, ...] = field(default=(), compare=False)  # what the case is an instance of, for counting

    def dtype_of(self, i: int) -> torch.dtype:
        return self.dtypes[i] if self.dtypes else self.dtype

    def lay(self, i: int, values: Tensor, device: torch.device) -> Tensor:
        return lay(values.to(device, self.dtype_of(i)), self.views[i])

    def counts(self) -> Counter[tuple[str, str]]:
        kinds = {view.kind for view, shape in zip(self.views, self.shapes, strict=False) if shape is not None}
        found = [("dtype", str(self.dtype).removeprefix("torch.")), *(("layout", kind) for kind in kinds)]
        found += [("layout of dy", self.views[-1].kind), *(("branch", branch) for branch in self.branches)]
        return Counter(found)


class Compared(NamedTuple):
    """What our function launched; what it was called with, and what PyTorch's was, on the CPU and in float64."""

    trace: Trace
    inputs: list[Tensor | None]
    exact: list[Tensor | None]


def compare(
    case: Case,
    values: Sequence[Tensor | None],
    mine: Callable[..., Tensor],
    right: Callable[..., Tensor],
    device: torch.device,
) -> Compared:
    """Runs both: kernels must serve mine, and its result and gradients must be right's, rounded once."""
    inputs = [None if t is None else case.lay(i, t, device) for i, t in enumerate(values)]
    exact = [None if t is None else t.cpu().double().contiguous() for t in inputs]
    seen: list[Tensor] = []

    def dy(y: Tensor) -> Tensor:
        seen.append(lay(integers(*y.shape, seed=9, dtype=y.dtype).to(y.device) * case.dy_step, case.views[-1]))
        return seen[-1]

    with backend("kernels"):
        found = run(mine, inputs, case.frozen, dy)
    assert found.y.dtype == case.dtype
    assert not [str(call) for call in found.trace if call.served_by != "kernels"]
    assert found.trace.launches or not inputs[0].numel()
    # contiguous: PyTorch's batch norm on the CPU differentiates wrongly where the axes of a dense gradient are permuted
    expected = run(right, exact, case.frozen, lambda y: seen[0].cpu().double().contiguous())
    names = "the result", *(f"the gradient of input {i}" for i in range(len(inputs)))
    for name, a, b in zip(names, found.tensors, expected.tensors, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert_rounded_once(name, a, b, case.dtype)
    return Compared(found.trace, inputs, exact)


def assert_rounded_once(name: str, mine: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """`mine` is `right`, which is float64, rounded from what the accumulator of a kernel for `dtype` holds exactly."""
    accumulated = right.to(accumulator_dtype(dtype))
    assert torch.equal(accumulated.double().nan_to_num(), right.nan_to_num()), (
        f"{name}: the case asks for what no accumulator can hold"
    )
    torch.testing.assert_close(
        mine.cpu(), accumulated.to(mine.dtype), rtol=0, atol=0, equal_nan=True, msg=lambda message: f"{name}: {message}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Convolution

FEW = st.integers(1, 3)
BATCHES = st.sampled_from([(1,), (2,), (1,), (2,), (3,), (), (0,)])


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a convolution or a pooling with at least one output."""

    size: int
    taps: int
    stride: int
    pad: int
    dilation: int


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    size, stride, pad, dilation = draw(st.integers(1, 9)), draw(FEW), draw(st.integers(0, 3)), draw(FEW)
    taps = draw(st.sampled_from([1, 1, 2, 3, 3, 3, 4, 5, 9]))
    return Axis(size, min(taps, (size + 2 * pad - 1) // dilation + 1), stride, pad, dilation)


@st.composite
def channels(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """(kind, C, K, groups)."""
    kind = draw(st.sampled_from(["one group", "one group", "groups", "depthwise"]))
    if kind == "one group":
        return kind, draw(st.sampled_from([1, 2, 3, 5, 16, 20, 33])), draw(st.sampled_from([1, 2, 7, 16, 34])), 1
    groups = draw(st.sampled_from([2, 3] if kind == "groups" else [2, 3, 8, 18]))
    each = draw(st.sampled_from([2, 5, 17])) if kind == "groups" else 1
    return (
        kind,
        groups * each,
        groups * draw(st.sampled_from([1, 1, 2, 3, 17] if kind == "groups" else [1, 1, 2])),
        groups,
    )


def geometry_branches(along: Sequence[Axis]) -> Iterator[str]:
    if all(a.taps == 1 for a in along):
        yield "1x1"
    if prod(a.taps for a in along) > 31:
        yield "more than 31 taps"
    if max(a.stride for a in along) > 1:
        yield "strided"
    if any(a.stride > a.taps for a in along):
        yield "inputs unseen"
    if any(a.dilation > 1 and a.taps > 1 for a in along):
        yield "dilated"
    if any(a.taps > a.size for a in along):
        yield "kernel larger than image"
    if any(a.size == 1 for a in along):
        yield "one pixel along an axis"


def few_taps(along: Sequence[Axis], most: int = 36) -> tuple[Axis, ...]:
    """The axes with at most 4 taps each, where there are more than `most` taps together: the interpreter takes its
    time for every tap.
    """
    return tuple(replace(a, taps=min(a.taps, 4)) for a in along) if prod(a.taps for a in along) > most else tuple(along)


def per_axis(along: Sequence[Axis], name: str) -> tuple[int, ...]:
    return tuple(getattr(a, name) for a in along)


@st.composite
def convolutions(draw: st.DrawFn, n: int) -> Case:
    """A convolution of n axes; its inputs are x, w, bias."""
    along = few_taps(draw(st.tuples(*[axes()] * n)))
    kind, C, K, groups = draw(channels())
    padding = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    if padding == "same":
        along = tuple(replace(a, stride=1) for a in along)
    elif padding == "valid":
        along = tuple(replace(a, pad=0, taps=min(a.taps, (a.size - 1) // a.dilation + 1)) for a in along)
    batch = draw(BATCHES)
    bias = draw(st.booleans())
    shapes = ((*batch, C, *per_axis(along, "size")), (K, C // groups, *per_axis(along, "taps")), (K,) if bias else None)
    options = {
        "stride": per_axis(along, "stride"),
        "padding": per_axis(along, "pad") if padding == "numbers" else padding,
        "dilation": per_axis(along, "dilation"),
        "groups": groups,
        "algorithm": draw(st.sampled_from(ALGORITHMS)),
    }
    branches = (
        kind,
        f"padding: {padding}",
        f"algorithm: {options['algorithm']}",
        *geometry_branches(along),
        *batch_branches(batch),
    )
    of = tuple(draw(views(len(shape or (1,)))) for shape in (*shapes, shapes[0]))
    return Case(shapes, of, draw(st.sampled_from(DTYPES)), options, frozen=draw(frozen_inputs(3)), branches=branches)


def batch_branches(batch: tuple[int, ...]) -> Iterator[str]:
    if not batch:
        yield "unbatched"
    elif batch == (0,):
        yield "empty batch"


def frozen_inputs(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    """The inputs without a gradient: mostly none, sometimes one or two of n."""
    some = st.lists(st.integers(0, n - 1), max_size=2, unique=True).map(tuple)
    return st.one_of(st.just(()), st.just(()), some)


def draw_operands(case: Case) -> list[Tensor | None]:
    """x from -2 to 2, everything else from -1 to 1."""
    sizes = enumerate(case.shapes)
    return [
        None if shape is None else integers(*shape, largest=2 if i == 0 else 1, seed=i, dtype=torch.float64)
        for i, shape in sizes
    ]


def check_convolution(name: str, case: Case, device: torch.device) -> Compared:
    options = without_algorithm(case)
    mine, right = partial(getattr(ours, name), **case.options), partial(getattr(theirs, name), **options)
    return compare(case, draw_operands(case), mine, right, device)


def without_algorithm(case: Case) -> dict[str, Any]:
    return {key: value for key, value in case.options.items() if key != "algorithm"}


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    """x, w, bias."""
    along, more = [], []
    for _ in range(2):
        a = replace(draw(axes()), size=draw(st.integers(1, 4)))
        a = replace(a, taps=min(a.taps, 6))
        more.append(draw(st.integers(0, max(a.stride, a.dilation) - 1)))
        whole = (a.size - 1) * a.stride + a.dilation * (a.taps - 1) + more[-1] + 1
        along.append(replace(a, pad=min(a.pad, (whole - 1) // 2)))
    kind, C, K, groups = draw(channels())
    batch = draw(BATCHES)
    shapes = (
        (*batch, C, *per_axis(along, "size")),
        (C, K // groups, *per_axis(along, "taps")),
        (K,) if draw(st.booleans()) else None,
    )
    options = {
        "stride": per_axis(along, "stride"),
        "padding": per_axis(along, "pad"),
        "output_padding": tuple(more),
        "groups": groups,
        "dilation": per_axis(along, "dilation"),
        "algorithm": draw(st.sampled_from(ALGORITHMS)),
    }
    branches = (kind, f"algorithm: {options['algorithm']}", *geometry_branches(along), *batch_branches(batch))
    branches += ("output_padding",) * any(more)
    of = tuple(draw(views(len(shape or (1,)))) for shape in (*shapes, shapes[0]))
    return Case(shapes, of, draw(st.sampled_from(DTYPES)), options, frozen=draw(frozen_inputs(3)), branches=branches)
