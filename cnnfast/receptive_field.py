"""Receptive fields: which rows of its input one position of a tensor can depend on, followed operator by operator, on
shapes alone.

For the position with index p along the height, the field is an interval of input rows,

    p * jump + first  to  p * jump + last,      size = last - first + 1

It starts as jump 1, first 0, last 0, and an operator changes it so (window k, dilation d, stride s, padding a, all
along the height):

    convolution, pooling     first - a * jump    last + ((k - 1) * d - a) * jump    jump * s
    transposed convolution   the ceil(((k - 1) * d + 1) / s) pixels whose windows meet                jump / s
    interpolation            nearest: the same; bilinear: one pixel more; bicubic: three more         jump / scale
    branches that meet       from the smallest `first` to the largest `last`: the largest field, where both are centred alike
    a sum over all positions (global pooling, a linear layer over a flattened image, softmax along positions): the whole input
    normalisation            as pointwise: what its statistics see is not counted
    anything else            as pointwise, if it keeps the shape; the whole input, if not

The first two rows are the recurrence of A. Araujo, W. Norris, J. Sim, "Computing Receptive Fields of Convolutional
Neural Networks" (Distill, 2019), its size r = r + (k - 1) * d * jump and its jump = jump * s. Sizes are not cut off at
the borders of the image, as there: ResNet-50's may exceed 224. Reshaping is followed exactly: every axis of a tensor is
kept as a product of digits (extent, step), step being the distance in input rows between neighbours. Flattening
concatenates digits, splitting an axis splits a digit, and a sum over an axis widens the field by (extent - 1) * step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Number = Fraction | float  # the infinite are floats
Digit = tuple[int, Number]  # extent, input rows from one to the next: 0 along other axes than the height
Axis = tuple[Digit, ...]  # the slowest digit first


@dataclass(frozen=True, slots=True)
class Field:
    """The rows that each element of a tensor sees: first to last, relative to the sum of its digits' index * step."""

    axes: tuple[Axis, ...]
    first: Number = Fraction(0)
    last: Number = Fraction(0)

    @property
    def size(self) -> int | None:
        """In input rows; None: the whole input."""
        return None if math.isinf(self.last) else math.ceil(self.last - self.first) + 1

    @property
    def jump(self) -> int | float | None:
        """Input rows between neighbouring positions; None if there are no positions left."""
        steps = [step for axis in self.axes for _, step in axis if step]
        if not steps:
            return None
        step = min(steps)
        return int(step) if step == int(step) else float(step)

    def widened(self, below: Number, above: Number) -> Field:
        return replace(self, first=self.first - below, last=self.last + above)

    def whole(self, *shape: int) -> Field:
        """The whole input, at every position; with a shape, one whose positions have lost their places."""
        return Field(plain(shape) if shape else self.axes, -math.inf, math.inf)

    def with_axis(self, axis: int, digits: Axis) -> Field:
        return replace(self, axes=(*self.axes[:axis], digits, *self.axes[axis + 1 :]))


def plain(shape: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(((n, Fraction(0)),) for n in shape)


def rows(axis: Axis) -> list[Digit]:
    return [digit for digit in axis if digit[1]]


Rule = Callable[[dict[str, Any], Sequence[Tensor], Tensor], Field]
ATTRIBUTE = "_cnnfast_field"


def of(t: Tensor) -> Field | None:
    """The field of a tensor, None if it does not depend on the input."""
    return getattr(t, ATTRIBUTE, None)


def see(t: Tensor) -> None:
    """Makes `t` an input. Rows run along the last axis but one of an image, along the last of a sequence [N, C, L]; [N,
    C] has none.
    """
    field = Field(plain(t.shape))
    if t.dim() < 3:
        field = field.whole()
    else:
        axis = t.dim() - (1 if t.dim() == 3 else 2)
        field = field.with_axis(axis, ((t.shape[axis], Fraction(1)),))
    setattr(t, ATTRIBUTE, field)


def follow(operator: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Gives the tensors that an operator of torch.ops.aten has returned their fields."""
    sources = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and of(t) is not None]
    if not sources:
        return
    names = [argument.name for argument in operator._schema.arguments]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    rule = RULES.get(operator._schema.name.removeprefix("aten::").removesuffix("_"), _pointwise)
    for t in tree_leaves(result):
        if isinstance(t, Tensor):
            setattr(t, ATTRIBUTE, rule(arguments, sources, t))


# ----------------------------------------------------------------------------------------------------------------------
# Rules: the operator's arguments by name, those of its tensors that have fields, and its result


def _field(t: Tensor) -> Field:
    field = of(t)
    assert field is not None
    return field


def _union(sources: Sequence[Tensor]) -> tuple[Number, Number]:
    fields = [_field(t) for t in sources]
    return min(field.first for field in fields), max(field.last for field in fields)


def _pointwise(_: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    """With broadcasting; an axis of the result runs along the rows as the source's does that strides furthest."""
    axes = list(plain(y.shape))
    for t in sources:
        for i, digits in enumerate(_field(t).axes, start=y.dim() - t.dim()):
            if i < 0 or t.shape[i - y.dim()] not in (1, y.shape[i]):
                return _field(t).whole(*y.shape)
            if t.shape[i - y.dim()] == y.shape[i] and sum(s for _, s in digits) > sum(s for _, s in axes[i]):
                axes[i] = digits
    return Field(tuple(axes), *_union(sources))


def _windows(
    field: Field, axis: int, window: int, stride: Number, padding: Number, dilation: int, extent: int
) -> Field:
    """Windows along one axis, `extent` of them; an axis that does not run along the rows changes its extent alone."""
    if not rows(field.axes[axis]):
        return field.with_axis(axis, plain([extent])[0])
    if len(field.axes[axis]) > 1:
        return field.with_axis(axis, plain([extent])[0]).whole()
    step = field.axes[axis][0][1]
    wider = field.widened(padding * step, ((window - 1) * dilation - padding) * step)
    return wider.with_axis(axis, ((extent, step * stride),))


def _summed(field: Field, axes: Sequence[int], keep: bool) -> Field:
    """Summed over axes, which disappear or have extent 1. Where no rows are left, every one of them has been summed."""
    for i in axes:
        for extent, step in rows(field.axes[i]):
            field = field.widened(0, (extent - 1) * step)
    summed = any(rows(field.axes[i]) for i in axes)
    kept = [plain([1])[0] if i in axes else digits for i, digits in enumerate(field.axes) if keep or i not in axes]
    left = any(rows(digits) for digits in kept)
    field = replace(field, axes=tuple(kept))
    return field.whole() if summed and not left else field


def _pick(values: int | Sequence[int], i: int) -> int:
    return values if isinstance(values, int) else values[i if len(values) > 1 else 0]


def _convolution(a: dict[str, Any], _: Sequence[Tensor], y: Tensor) -> Field:
    x, w = a["input"], a["weight"]
    if of(x) is None:  # weights made from the input
        return _field(w).whole(*y.shape)
    field = _summed(_field(x), [1], keep=True).with_axis(1, plain([y.shape[1]])[0])
    for i in range(2, x.dim()):
        stride, padding, dilation = (_pick(a[name], i - 2) for name in ("stride", "padding", "dilation"))
        if not a["transposed"]:
            field = _windows(field, i, w.shape[i], stride, padding, dilation, y.shape[i])
        else:
            span = (w.shape[i] - 1) * dilation
            pixels = -(-(span + 1) // stride)
            before = Fraction(pixels - 1, 2) + Fraction(span - 2 * padding, 2 * stride)  # in the middle of the phases
            field = _windows(field, i, pixels, Fraction(1, stride), before, 1, y.shape[i])
    return field


def _pooling(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    field = _field(sources[0])
    window = a["kernel_size"]
    stride, padding, dilation = a.get("stride") or window, a.get("padding", 0), a.get("dilation", 1)
    before = y.dim() - len(window)
    for i, k in enumerate(window):
        field = _windows(
            field, before + i, k, _pick(stride, i), _pick(padding, i), _pick(dilation, i), y.shape[before + i]
        )
    return field


def _adaptive_pooling(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    x = sources[0]
    field = _field(x)
    for i in range(y.dim() - len(a["output_size"]), y.dim()):
        size, extent = x.shape[i], y.shape[i]
        if extent == 1 < size:
            field = _summed(field, [i], keep=True)
        else:
            window = max(-(-(p + 1) * size // extent) - p * size // extent for p in range(extent))
            field = _windows(field, i, window, Fraction(size, extent), 0, 1, extent)
    return field


def _interpolation(pixels: int) -> Rule:
    """Of so many neighbours."""

    def rule(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
        x = sources[0]
        field = _field(x)
        for i in range(2, y.dim()):
            jump = Fraction(x.shape[i], y.shape[i])
            field = _windows(field, i, pixels, jump, Fraction(pixels - 1, 2) + (1 - jump) / 2, 1, y.shape[i])
        return field

    return rule


def _padding(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    field = _field(sources[0])
    amounts = a["pad"] if "pad" in a else a["padding"]
    for i in range(len(amounts) // 2):
        axis = y.dim() - 1 - i
        field = (
            _windows(field, axis, 1, 1, amounts[2 * i], 1, y.shape[axis]) if any(amounts[2 * i : 2 * i + 2]) else field
        )
    return field


def _reduction(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    x, dims = sources[0], a.get("dim")
    if "other" in a:  # max(a, b)
        return _pointwise(a, sources, y)
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return _summed(_field(x), [d % x.dim() for d in dims] if x.dim() else [], keep=y.dim() == x.dim())


def _along(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    """Every element along `dim` sees all of them: softmax, cumulative sums, sorting."""
    field = _field(sources[0])
    return field.whole() if rows(field.axes[a.get("dim", -1)]) else field


def _attention(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    """[..., L, E] attends to [..., S, E]."""
    return _along({"dim": -2}, sources, y)


def _product(left: str, right: str) -> Rule:
    """Matrix products [..., I, K] @ [..., K, J]: a sum over K."""

    def rule(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
        axes, first, last = list(plain(y.shape)), [], []
        for name, contracted in ((left, -1), (right, -2)):
            t = a[name]
            if of(t) is None:
                continue
            field = _summed(_field(t), [t.dim() + contracted], keep=True)
            first.append(field.first)
            last.append(field.last)
            for i, digits in enumerate(field.axes):
                if i != t.dim() + contracted and rows(digits):
                    axes[i] = digits
        for t in sources:  # what is added to the product
            if t is not a[left] and t is not a[right]:
                first.append(_field(t).first)
                last.append(_field(t).last)
        return Field(tuple(axes), min(first), max(last))

    return rule


def _reshape(_: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    field = _field(sources[0])
    digits = list(_joined([digit for axis in field.axes for digit in axis if digit[0] != 1]))
    axes: list[Axis] = []
    for extent in y.shape:
        axis: list[Digit] = []
        missing = extent
        while missing > 1:
            n, step = digits.pop(0)
            if n % missing == 0:  # its slow part; the rest belongs to the next axis
                axis.append((missing, step * (n // missing)))
                digits[:0] = [(n // missing, step)] if n > missing else []
                missing = 1
            elif missing % n == 0:
                axis.append((n, step))
                missing //= n
            else:
                return field.whole(*y.shape)
        axes.append(_joined(axis) or plain([extent])[0])
    return replace(field, axes=tuple(axes))


def _joined(axis: list[Digit]) -> Axis:
    """Neighbouring digits that count as one are one."""
    joined: list[Digit] = []
    for n, step in axis:
        if joined and joined[-1][1] == n * step:
            joined[-1] = (joined[-1][0] * n, step)
        else:
            joined.append((n, step))
    return tuple(joined)


def _permute(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    field = _field(sources[0])
    order = list(range(y.dim()))
    if "dims" in a:
        order = [d % y.dim() for d in a["dims"]]
    elif y.dim() > 1:
        i, j = a.get("dim0", 0), a.get("dim1", 1)
        order[i], order[j] = order[j], order[i]
    return replace(field, axes=tuple(field.axes[d] for d in order))


def _select(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    field = _field(sources[0])
    axis = a["dim"] % len(field.axes)
    return replace(field, axes=(*field.axes[:axis], *field.axes[axis + 1 :]))


def _slice(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    x, axis = sources[0], a.get("dim", 0) % y.dim()
    if x.shape == y.shape:
        return _field(x)
    start = a.get("start") or 0
    start = max(0, start + x.shape[axis] if start < 0 else start)
    return _windows(_field(x), axis, 1, a.get("step", 1), -start, 1, y.shape[axis])


def _part(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    """Parts of an axis; where they lie along the rows is not followed."""
    axis = a.get("dim", 0) % y.dim()
    field = _field(sources[0])
    return field if sources[0].shape == y.shape else _windows(field, axis, 1, 1, 0, 1, y.shape[axis])


def _concatenation(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    axis = a.get("dim", 0) % y.dim()
    axes = list(plain(y.shape))
    for t in sources:
        for i, digits in enumerate(_field(t).axes):
            if sum(s for _, s in digits) > sum(s for _, s in axes[i]):
                axes[i] = ((y.shape[i], max(s for _, s in digits)),) if i == axis else digits
    return Field(tuple(axes), *_union(sources))


def _pixel_shuffle(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    return _interpolation(1)(a, sources, y).with_axis(y.dim() - 3, plain([y.shape[-3]])[0])


def _pixel_unshuffle(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    r, axis = a["downscale_factor"], y.dim() - 2
    return _windows(_field(sources[0]), axis, r, r, 0, 1, y.shape[axis]).with_axis(
        axis - 1, plain([y.shape[axis - 1]])[0]
    )


def _unbind(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    return _select({"dim": a.get("dim", 0)}, sources, y)


def _stack(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    field = _field(sources[0])
    axis = a.get("dim", 0) % y.dim()
    return Field((*field.axes[:axis], plain([len(a["tensors"])])[0], *field.axes[axis:]), *_union(sources))


def _everything(a: dict[str, Any], sources: Sequence[Tensor], y: Tensor) -> Field:
    return _field(sources[0]).whole(*y.shape)


RULES: dict[str, Rule] = {
    name: rule
    for rule, names in (
        (_convolution, "convolution"),
        (
            _pooling,
            "max_pool1d max_pool2d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d",
        ),
        (_adaptive_pooling, "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"),
        (_adaptive_pooling, "fractional_max_pool2d fractional_max_pool3d"),
        (_interpolation(1), "upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
        (_interpolation(1), "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"),
        (_interpolation(2), "upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_bilinear2d_aa"),
        (_interpolation(4), "upsample_bicubic2d _upsample_bicubic2d_aa"),
        (_padding, "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"),
        (_padding, "replication_pad1d replication_pad2d replication_pad3d"),
        (
            _reduction,
            "mean sum amax amin max min var std var_mean prod logsumexp linalg_vector_norm norm argmax argmin any all",
        ),
        (_along, "_softmax _log_softmax _safe_softmax cumsum cumprod sort"),
        (_attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
        (_attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
        (_product("self", "mat2"), "mm bmm"),
        (_product("mat1", "mat2"), "addmm"),
        (_product("batch1", "batch2"), "baddbmm"),
        (_reshape, "view _unsafe_view reshape squeeze unsqueeze flatten"),
        (_permute, "permute transpose t"),
        (_select, "select"),
        (_unbind, "unbind"),
        (_slice, "slice"),
        (_part, "split split_with_sizes chunk glu"),
        (_concatenation, "cat"),
        (_stack, "stack"),
        (_pixel_shuffle, "pixel_shuffle"),
        (_pixel_unshuffle, "pixel_unshuffle"),
        (_everything, "_fft_r2c _fft_c2c _fft_c2r"),
    )
    for name in names.split()
}
