"""The cases of fuzz.py whose results take a pooling: averages are of numbers that all their divisors divide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, lcm
from typing import Any

import torch
import torch.nn.functional as theirs
from hypothesis import strategies as st
from torch import Tensor

import cnnfast.functional as ours
from tests.support.agreement import integers
from tests.support.fuzz import (
    BATCHES,
    CAPACITY,
    DTYPES,
    Axis,
    Case,
    Compared,
    axes,
    batch_branches,
    compare,
    geometry_branches,
    per_axis,
)
from tests.support.views import views

SPECIAL = {"NaN": float("nan"), "-inf": -float("inf"), "inf": float("inf")}
CHANNELS = st.sampled_from([1, 2, 3, 5, 8, 24])


@st.composite
def windows(draw: st.DrawFn, dilated: bool) -> tuple[Axis, Axis]:
    along = []
    for a in draw(st.tuples(axes(), axes())):
        a = a if dilated else replace(a, dilation=1)
        while a.dilation * (a.taps - 1) >= a.size + 2 * min(a.pad, a.taps // 2):
            a = replace(a, taps=a.taps - 1)
        a = replace(a, pad=min(a.pad, a.taps // 2))
        along.append(replace(a, dilation=1) if sees_nothing(a) else a)
    return along[0], along[1]


def sees_nothing(a: Axis) -> bool:
    """A window steps over the whole image: PyTorch's gradient writes to memory that is not its own then."""
    starts = range(-a.pad, 0, a.stride)
    return any(not any(0 <= start + tap * a.dilation < a.size for tap in range(a.taps)) for start in starts)


@st.composite
def images(draw: st.DrawFn, H: int, W: int) -> tuple[int, ...]:
    return (*draw(BATCHES), draw(CHANNELS), H, W)


def pool_branches(shape: tuple[int, ...], along: tuple[Axis, Axis], options: dict[str, Any]) -> Iterator[str]:
    yield from geometry_branches(along)
    yield from batch_branches(shape[:-3])
    if any(a.pad for a in along):
        yield "padding"
    if options["ceil_mode"] and any((a.size + 2 * a.pad - a.dilation * (a.taps - 1) - 1) % a.stride for a in along):
        yield "ceil_mode with a remainder"
    if any(a.dilation * (a.taps - 1) + 1 > a.stride for a in along):
        yield "windows overlap"


@st.composite
def max_pools(draw: st.DrawFn) -> Case:
    along = draw(windows(dilated=True))
    if draw(st.integers(0, 19)) == 19:  # more taps than a byte counts
        along = (
            replace(along[0], size=18, taps=18, dilation=1, pad=0),
            replace(along[1], size=16, taps=15, dilation=1, pad=2),
        )
    shape = draw(images(*per_axis(along, "size")))
    options = {
        "kernel_size": per_axis(along, "taps"),
        "stride": draw(st.sampled_from([None, [], per_axis(along, "stride"), per_axis(along, "stride")])),
        "padding": per_axis(along, "pad"),
        "dilation": per_axis(along, "dilation"),
        "ceil_mode": draw(st.booleans()),
        "return_indices": draw(st.booleans()),
        "special": draw(st.sampled_from([(), (), ("NaN",), ("-inf",), ("NaN", "-inf", "inf")])),
    }
    branches = (*pool_branches(shape, along, options), *options["special"], *["indices"] * options["return_indices"])
    of = draw(views(len(shape))), draw(views(len(shape)))
    return Case((shape,), of, draw(st.sampled_from(DTYPES)), options, branches=branches)


def check_max_pool(case: Case, device: torch.device) -> Compared:
    options = dict(case.options)
    special, with_indices = options.pop("special"), options["return_indices"]
    (shape,) = case.shapes
    assert shape is not None
    x = integers(*shape, dtype=torch.float64)  # few different numbers: many are equal
    for i, name in enumerate(special):
        where = integers(*shape, largest=3, seed=50 + i) == 3
        x = torch.where(where, SPECIAL[name], x)
    found: list[Tensor] = []

    def call(function: Any, x: Tensor) -> Tensor:
        if not with_indices:
            return function(x, **options)
        y, indices = function(x, **options)
        found.append(indices)
        return y

    compared = compare(case, [x], lambda x: call(ours.max_pool2d, x), lambda x: call(theirs.max_pool2d, x), device)
    if with_indices:
        assert torch.equal(found[0].cpu(), found[1])
    return compared


def dividing(step: int) -> st.SearchStrategy[torch.dtype]:
    """The dtypes that hold `step`."""
    return st.sampled_from([dtype for dtype in DTYPES if step <= CAPACITY[dtype]])


def divisors(a: Axis) -> set[int]:
    """What windows along an axis may count, whichever pixels of the padding they do."""
    return set(range(1, a.taps + 1)) if a.pad or a.stride > 1 else {a.taps}


@st.composite
def average_pools(draw: st.DrawFn) -> Case:
    along = draw(windows(dilated=False))
    shape = draw(images(*per_axis(along, "size")))
    divisor = draw(st.sampled_from([None, None, None, 1, 3, -2]))
    options = {
        "kernel_size": per_axis(along, "taps"),
        "stride": draw(st.sampled_from([None, [], per_axis(along, "stride"), per_axis(along, "stride")])),
        "padding": per_axis(along, "pad"),
        "ceil_mode": draw(st.booleans()),
        "count_include_pad": draw(st.booleans()),
        "divisor_override": divisor,
    }
    if options["stride"] in (None, []):
        along = replace(along[0], stride=along[0].taps), replace(along[1], stride=along[1].taps)
    step = lcm(*(h * w for h in divisors(along[0]) for w in divisors(along[1]))) if divisor is None else abs(divisor)
    branches = tuple(pool_branches(shape, along, options)) + ("divisor_override",) * (divisor is not None)
    branches += ("padding does not count",) * (not options["count_include_pad"])
    return averaging(draw, shape, step, options, branches)


def averaging(
    draw: st.DrawFn, shape: tuple[int, ...], step: int, options: dict[str, Any], branches: tuple[str, ...]
) -> Case:
    """Of x and a gradient that are multiples of `step`."""
    of = draw(views(len(shape))), draw(views(len(shape)))
    return Case((shape,), of, draw(dividing(step)), options, dy_step=step, branches=branches)


def window_sizes(size: int, extent: int) -> set[int]:
    return {ceil((p + 1) * size / extent) - p * size // extent for p in range(extent)}


@st.composite
def adaptive_pools(draw: st.DrawFn) -> Case:
    size = st.integers(1, 7)
    shape = draw(images(draw(size), draw(size)))
    wanted = draw(st.one_of(size, st.tuples(st.one_of(st.none(), size), st.one_of(st.none(), size))))
    extents = [
        own if n is None else n
        for own, n in zip(shape[-2:], wanted if isinstance(wanted, tuple) else (wanted, wanted), strict=True)
    ]
    steps = [window_sizes(own, n) for own, n in zip(shape[-2:], extents, strict=True)]
    branches = {
        "fewer pixels" if n < own else "more pixels" if n > own else "as many pixels"
        for own, n in zip(shape[-2:], extents, strict=True)
    }
    branches |= {"whole planes"} if extents == [1, 1] else set()
    step = lcm(*(h * w for h in steps[0] for w in steps[1]))
    return averaging(draw, shape, step, {"output_size": wanted}, (*sorted(branches), *batch_branches(shape[:-3])))


@st.composite
def global_pools(draw: st.DrawFn) -> Case:
    large = draw(st.integers(0, 9)) == 9  # planes that several programs share
    shape = (1, 32, 36, 32) if large else draw(images(draw(st.integers(1, 9)), draw(st.integers(1, 9))))
    branches = ("several programs a plane",) * large + tuple(batch_branches(shape[:-3]))
    return averaging(draw, shape, shape[-2] * shape[-1], {"keepdim": draw(st.booleans())}, branches)


def multiples(case: Case) -> Tensor:
    (shape,) = case.shapes
    assert shape is not None
    return integers(*shape, dtype=torch.float64) * case.dy_step


def check_average_pool(case: Case, device: torch.device) -> Compared:
    mine, right = (lambda x, f=f: f.avg_pool2d(x, **case.options) for f in (ours, theirs))
    return compare(case, [multiples(case)], mine, right, device)


def check_adaptive_pool(case: Case, device: torch.device) -> Compared:
    mine, right = (lambda x, f=f: f.adaptive_avg_pool2d(x, **case.options) for f in (ours, theirs))
    return compare(case, [multiples(case)], mine, right, device)


def check_global_pool(case: Case, device: torch.device) -> Compared:
    keepdim = case.options["keepdim"]
    if not keepdim:  # the gradient has two axes less
        view = case.views[1]
        order = tuple(axis for axis in view.order if axis < len(view.order) - 2)
        case = replace(
            case, views=(case.views[0], replace(view, order=order, steps=view.steps[:-2], repeated=view.repeated[:-2]))
        )
    return compare(
        case,
        [multiples(case)],
        lambda x: ours.global_avg_pool2d(x, keepdim),
        lambda x: x.mean((-2, -1), keepdim),
        device,
    )
