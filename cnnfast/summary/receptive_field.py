"""Receptive fields: which rows of its input one position of a tensor can depend on, followed operator by operator, on
shapes and strides alone.

For the position with index p along the height, the field is an interval of input rows,

    p * jump + first  to  p * jump + last,      size = last - first + 1

It starts as jump 1, first 0, last 0. What looks through windows along the height changes it in one way, Field.window:
position p of the result sees `span` positions of the operand from p * stride + start on.

    convolution, pooling     stride s, start -padding, span (taps - 1) * dilation + 1
    transposed convolution   stride 1 / s, and a span of as many pixels as have windows that meet, centred
    resampling               stride size / new size, and a span of as many pixels as are mixed, centred
    padding                  stride 1, start -padding, span 1

This is the recurrence of A. Araujo, W. Norris, J. Sim, "Computing Receptive Fields of Convolutional Neural Networks"
(Distill, 2019). As there, sizes are not cut off at the borders of the image: ResNet-50's may exceed 224.

Branches that meet see from the smallest `first` to the largest `last`. Sums over all positions (global pooling, a
linear layer over a flattened image) and what mixes all positions (attention, softmax along them) see the whole input;
what the statistics of a normalisation see is not counted. Any other operator is taken for pointwise if it keeps the
shape, and sees the whole input if not.

Views are followed exactly, by their strides: slices, permuted and split axes, and axes that are one after reshaping.
For that every axis of a tensor is a product of digits (extent, step), the slowest first, `step` being the distance in
input rows between neighbours; a sum over an axis widens the field by (extent - 1) * step for each of its digits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Axis = tuple[tuple[int, float], ...]  # digits; the step is 0 along other axes than the height


@dataclass(frozen=True, slots=True)
class Field:
    """The rows that each element of a tensor sees: first to last, relative to the sum of its digits' index * step."""

    axes: tuple[Axis, ...]
    first: float = 0
    last: float = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(n for n, _ in axis) for axis in self.axes)

    @property
    def size(self) -> int | None:
        """In input rows; None: the whole input."""
        return None if math.isinf(self.last) else math.ceil(round(self.last - self.first, 6)) + 1

    @property
    def jump(self) -> int | float | None:
        """Input rows between neighbouring positions; None if there are no positions left."""
        step = min((step for axis in self.axes for _, step in axis if step), default=None)
        return round(step) if step is not None and abs(step - round(step)) < 1e-6 else step

    def rows(self, axis: int) -> float:
        """Input rows between neighbours along an axis, or more; 0 unless it runs along the height."""
        return sum(step for _, step in self.axes[axis])

    def whole(self) -> Field:
        return replace(self, first=-math.inf, last=math.inf)

    def with_axis(self, axis: int, *axes: Axis) -> Field:
        """One axis replaced by `axes`, or dropped."""
        return replace(self, axes=(*self.axes[:axis], *axes, *self.axes[axis + 1 :]))

    def window(self, axis: int, extent: int, stride: float, start: float, span: int) -> Field:
        """Of `extent` positions along an axis, position p sees `span` of those here, from p * stride + start on."""
        if len(self.axes[axis]) > 1 and self.rows(axis):  # windows over several digits are not followed
            return self.with_axis(axis, ((extent, 0),)).whole()
        step = self.rows(axis)
        field = self.with_axis(axis, ((extent, step * stride),))
        return replace(field, first=self.first + start * step, last=self.last + (start + span - 1) * step)

    def summed(self, axes: Iterable[int]) -> Field:
        """Summed over axes, which then have extent 1: over every row, if none is left."""
        field = self
        for i in axes:
            widened = sum((n - 1) * step for n, step in self.axes[i])
            field = replace(field.with_axis(i, ((1, 0),)), last=field.last + widened)
        return field.whole() if field.jump is None and self.jump is not None else field


def plain(shape: Iterable[int]) -> Field:
    """A field of which no axis runs along the height."""
    return Field(tuple(((n, 0),) for n in shape))


ATTRIBUTE = "_cnnfast_field"


def of(t: Tensor) -> Field | None:
    """The field of a tensor, None if it does not depend on the input."""
    return getattr(t, ATTRIBUTE, None)


def see(t: Tensor) -> None:
    """Makes `t` an input. The height is the last axis but one of an image, and the last of a sequence [N, C, L]; [N, C]
    has none.
    """
    axis = t.dim() - (1 if t.dim() == 3 else 2)
    field = plain(t.shape)
    setattr(t, ATTRIBUTE, field.whole() if t.dim() < 3 else field.with_axis(axis, ((t.shape[axis], 1),)))


def follow(operator: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Gives the tensors that an operator of torch.ops.aten has returned their fields."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and of(t)]
    if not tensors:
        return
    sources = [getattr(t, ATTRIBUTE) for t in tensors]
    schema = operator._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False))
    arguments = {a.name: a.default_value for a in schema.arguments} | given | kwargs
    rule = _rule(schema.name.removeprefix("aten::").strip("_"), "dim" in arguments)
    storage = tensors[0].untyped_storage()._cdata
    for y in tree_leaves(result):
        if isinstance(y, Tensor):
            is_view = not schema.is_mutable and y.untyped_storage()._cdata == storage
            field = _viewed(sources[0], tensors[0], y) if is_view else rule(arguments, sources, y.shape)
            setattr(y, ATTRIBUTE, field if field.shape == y.shape else plain(y.shape).whole())


def _viewed(field: Field, x: Tensor, y: Tensor) -> Field:
    """Of a view y of x: each of its axes runs through those digits of x that lie as far apart in memory."""
    digits: list[tuple[int, int, float]] = []  # of x: distance in memory between neighbours, extent, step
    for axis, distance in zip(field.axes, x.stride(), strict=True):
        for n, step in reversed(axis):
            digits += [(distance, n, step)] if n > 1 and distance else []
            distance *= n
    digits.sort(reverse=True)
    offset, start = int(y.storage_offset() - x.storage_offset()), 0.0
    for distance, _, step in digits:  # y begins at this element of x, and so many rows further on
        start += offset // distance * step
        offset %= distance
    axes: list[Axis] = []
    for extent, stride in zip(y.shape, y.stride(), strict=True):
        made: list[tuple[int, float]] = []
        left = extent
        while left > 1 and stride:  # its fastest digit first: that of x along which `stride` moves
            distance, n, step = next((d for d in digits if stride % d[0] == 0), (stride, left, 0.0))
            taken = min(left, -(-n * distance // stride))
            if left % taken or taken == 1:  # an axis that is not made of whole digits
                return plain(y.shape).whole()
            step *= stride // distance
            if made and step == made[0][0] * made[0][1]:  # two digits that count as one
                made[0] = (made[0][0] * taken, made[0][1])
            else:
                made.insert(0, (taken, step))
            left, stride = left // taken, stride * taken
        axes.append(tuple(made) or ((extent, 0.0),))
    return Field(tuple(axes), field.first + start, field.last + start)


# ----------------------------------------------------------------------------------------------------------------------
# Rules: from an operator's arguments by name, and the fields of its tensors, to the field of a result of this shape

Rule = Callable[[dict[str, Any], Sequence[Field], Sequence[int]], Field]


def _met(_: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    """What is pointwise, with broadcasting. An axis is that of the source in which its step is largest."""
    met = Field(plain(shape).axes, min(field.first for field in sources), max(field.last for field in sources))
    for field in sources:
        for i, (axis, n) in enumerate(zip(field.axes, field.shape, strict=True), start=len(shape) - len(field.axes)):
            if i < 0 or n not in (1, shape[i]):
                return plain(shape).whole()
            if n == shape[i] and sum(step for _, step in axis) > met.rows(i):
                met = met.with_axis(i, axis)
    return met


def _pick(values: Any, i: int) -> int:
    return values if isinstance(values, int) else values[i if len(values) > 1 else 0]


def _convolution(a: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    field, taps = of(a["input"]), a["weight"].shape
    if field is None:  # the weights are made from the input
        return plain(shape).whole()
    field = field.summed([1]).with_axis(1, ((shape[1], 0),))
    for i in range(2, len(shape)):
        stride, padding, dilation = (_pick(a[name], i - 2) for name in ("stride", "padding", "dilation"))
        span = (taps[i] - 1) * dilation + 1
        if a["transposed"]:
            pixels = -(-span // stride)
            centred = (2 * padding + 1 - span) / (2 * stride) - (pixels - 1) / 2
            field = field.window(i, shape[i], 1 / stride, centred, pixels)
        else:
            field = field.window(i, shape[i], stride, -padding, span)
    return field


def _pooling(a: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    field, taps = sources[0], a["kernel_size"]
    for i, axis in enumerate(range(len(shape) - len(taps), len(shape))):
        stride, padding, dilation = a["stride"] or taps, a["padding"], a.get("dilation", 1)
        span = (taps[i] - 1) * _pick(dilation, i) + 1
        field = field.window(axis, shape[axis], _pick(stride, i), -_pick(padding, i), span)
    return field


def _resampling(pixels: int, _: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    """Every position mixes so many pixels around its own place; 0: all that it covers, be it in part."""
    field = sources[0]
    for i, (size, extent) in enumerate(zip(field.shape, shape, strict=True)):
        if extent == 1 < size:
            field = field.summed([i])
        elif extent != size:
            mixed = pixels or max(-(-(p + 1) * size // extent) - p * size // extent for p in range(extent))
            field = field.window(i, extent, size / extent, (size / extent - mixed) / 2, mixed)
    return field


def _padding(a: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    field, amounts = sources[0], a["pad"] if "pad" in a else a["padding"]
    for axis, before, after in zip(reversed(range(len(shape))), amounts[::2], amounts[1::2], strict=False):
        field = field.window(axis, shape[axis], 1, -before, 1) if before or after else field
    return field


def _along(a: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    """Sums over axes, which they drop or shorten, and softmax, sorting and the like, which keep the shape."""
    field, dims = sources[0], a["dim"]
    count = len(field.axes)
    axes = {d % count for d in ([dims] if isinstance(dims, int) else dims or range(count)) if count}
    if field.shape == shape:
        return field.whole() if any(map(field.rows, axes)) else field
    field = field.summed(axes)
    for i in sorted(axes, reverse=True):
        field = field.with_axis(i, ((shape[i], 0),)) if len(shape) == count else field.with_axis(i)
    return field


def _product(a: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    """[..., I, K] @ [..., K, J], a sum over K, and what is added to it."""
    *added, left, right = (t for t in a.values() if isinstance(t, Tensor))
    factors = [field.summed([t.dim() + i]) for t, i in ((left, -1), (right, -2)) if (field := of(t))]
    return _met(a, [*factors, *filter(None, map(of, added))], shape)


def _concatenation(a: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    axis = a["dim"] % len(shape)
    steps = [max(step for _, step in field.axes[axis]) for field in sources]
    fields = [field.with_axis(axis, ((shape[axis], step),)) for field, step in zip(sources, steps, strict=True)]
    return _met(a, fields, shape)


def _stack(a: dict[str, Any], sources: Sequence[Field], shape: Sequence[int]) -> Field:
    axis = a["dim"] % len(shape)
    met = _met(a, sources, (*shape[:axis], *shape[axis + 1 :]))
    return replace(met, axes=(*met.axes[:axis], ((shape[axis], 0),), *met.axes[axis:]))


RULES: list[tuple[str, Rule]] = [
    ("convolution", _convolution),
    ("adaptive_.*pool.*|fractional_.*pool.*|pixel_(un)?shuffle", partial(_resampling, 0)),
    ("(max|avg)_pool.*", _pooling),
    ("upsample_nearest.*", partial(_resampling, 1)),
    ("upsample_.*linear.*", partial(_resampling, 2)),
    ("upsample_bicubic.*", partial(_resampling, 4)),
    ("(constant|reflection|replication)_pad.*", _padding),
    ("mm|bmm|addmm|baddbmm", _product),
    ("cat", _concatenation),
    ("stack", _stack),
    ("scaled_dot_product.*", lambda a, sources, shape: _along({"dim": -2}, sources, shape)),
    ("fft.*", lambda a, sources, shape: plain(shape).whole()),
]


@cache
def _rule(operator: str, has_dim: bool) -> Rule:
    """The rule whose pattern is the operator's whole name; without one, an argument `dim` says what is summed."""
    named = (rule for pattern, rule in RULES if re.fullmatch(pattern, operator))
    return next(named, _along if has_dim else _met)
