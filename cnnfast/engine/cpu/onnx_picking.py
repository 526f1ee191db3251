"""What picks elements and puts them into other places, in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .onnx_layers import per_axis
from .onnx_shapes import in_shape, permuted
from .onnx_sizes import NoOnnxForm
from .onnx_writer import Number, OnnxValue, OnnxWriter

END = 2**63 - 1


def sliced(
    w: OnnxWriter,
    x: OnnxValue | str,
    dim: int = 0,
    start: Number | None = None,
    end: Number | None = None,
    step: int = 1,
) -> str:
    return w.call(
        "Slice",
        x,
        w.integers([0 if start is None else start]),
        w.integers([END if end is None else end]),
        w.integers([dim]),
        w.integers([step]),
    )


def narrow(w: OnnxWriter, x: OnnxValue, dim: int, start: int, length: int) -> str:
    return sliced(w, x, dim, start, END if start + length == 0 else start + length)


def select(w: OnnxWriter, x: OnnxValue, dim: int, index: Number) -> str:
    return w.call("Gather", x, w.cast(index, torch.int64), axis=dim)


def index_select(w: OnnxWriter, x: OnnxValue, dim: int, index: OnnxValue) -> str:
    return w.call("Gather", x, index, axis=dim)


def embedding(w: OnnxWriter, weight: OnnxValue, index: OnnxValue, *_: Any) -> str:
    return w.call("Gather", weight, index, axis=0)


def gather(w: OnnxWriter, x: OnnxValue, dim: int, index: OnnxValue, sparse: bool = False) -> str:
    return w.call("GatherElements", x, index, axis=dim)


def indexed(w: OnnxWriter, x: OnnxValue, indices: Sequence[OnnxValue | None]) -> str:
    """x[:, index]: one index, of integers, in one dimension."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype not in (torch.int32, torch.int64):
        raise NoOnnxForm("an index by several tensors, or by truth values")
    return w.call("Gather", x, given[0][1], axis=given[0][0])


def turned_around(w: OnnxWriter, x: str, dim: int, shift: int, size: int) -> str:
    """The last `shift` elements of a dimension come first."""
    at = shift % size
    return w.call("Concat", sliced(w, x, dim, size - at), sliced(w, x, dim, 0, size - at), axis=dim) if at else x


def rolled(w: OnnxWriter, x: OnnxValue, shifts: Sequence[int], dims: Sequence[int] = ()) -> str:
    if not dims:
        flat = w.call("Reshape", x, w.integers([-1]))
        return in_shape(w, turned_around(w, flat, 0, shifts[0], math.prod(x.sizes(*range(len(x.shape))))))
    y = x.name
    for shift, dim in zip(shifts, dims, strict=True):
        y = turned_around(w, y, dim, shift, x.size(dim))
    return y


def flipped(w: OnnxWriter, x: OnnxValue, dims: Sequence[int]) -> str:
    y: OnnxValue | str = x
    for dim in dims:
        y = sliced(w, y, dim, -1, -END, -1)
    return y if isinstance(y, str) else y.name


def pixel_shuffle(w: OnnxWriter, x: OnnxValue, factor: int) -> str:
    return w.call("DepthToSpace", x, blocksize=factor, mode="CRD")


def pixel_unshuffle(w: OnnxWriter, x: OnnxValue, factor: int) -> str:
    """ONNX's SpaceToDepth puts the channels last in order, PyTorch first."""
    C, H, W = x.sizes(1, 2, 3)
    y = w.call("Reshape", x, w.integers([-1, C, H // factor, factor, W // factor, factor]))
    return in_shape(w, w.call("Transpose", y, perm=[0, 1, 3, 5, 2, 4]))


def channel_shuffle(w: OnnxWriter, x: OnnxValue, groups: int) -> str:
    C, *image = x.sizes(*range(1, len(x.shape)))
    y = w.call("Reshape", x, w.integers([-1, groups, C // groups, math.prod(image)]))
    return in_shape(w, w.call("Transpose", y, perm=[0, 2, 1, 3]))


def quarter_turns(w: OnnxWriter, x: OnnxValue, k: int = 1, dims: Sequence[int] = (0, 1)) -> str:
    first, second = (dim % len(x.shape) for dim in dims)
    if k % 4 == 0:
        return x.name
    if k % 4 == 2:
        return flipped(w, x, [first, second])
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    turned = OnnxValue(permuted(w, x, order), (1,) * len(order), x.dtype)
    return flipped(w, turned, [first if k % 4 == 1 else second])


def windows(w: OnnxWriter, x: OnnxValue, dim: int, size: int, step: int) -> str:
    """unfold: windows along a dimension; their elements are the last one."""
    if not x.shape:
        raise NoOnnxForm("windows of a single number")
    dim %= len(x.shape)
    starts = torch.arange(0, x.size(dim) - size + 1, step)
    picked = w.call("Gather", x, w.tensor(starts[:, None] + torch.arange(size)), axis=dim)
    rank = len(x.shape) + 1
    order = [d for d in range(rank) if d != dim + 1] + [dim + 1]
    return w.call("Transpose", picked, perm=order)


def diagonal(w: OnnxWriter, x: OnnxValue, offset: int = 0, first: int = 0, second: int = 1) -> str:
    rank = len(x.shape)
    first, second = first % rank, second % rank
    rows, columns = x.sizes(first, second)
    others = [dim for dim in range(rank) if dim not in (first, second)]
    planes = w.call("Transpose", x, perm=[*others, first, second])
    flat = w.call("Reshape", planes, w.integers([*[0] * len(others), rows * columns]))
    places = torch.arange(rows * columns).reshape(rows, columns).diagonal(offset)
    return w.call("Gather", flat, w.tensor(places), axis=-1)


def one_hot(w: OnnxWriter, x: OnnxValue, classes: int = -1) -> str:
    if classes < 0:
        raise NoOnnxForm("one_hot without the number of classes")
    return w.call("OneHot", x, w.number(classes, torch.int64), w.number([0, 1], w.result.dtype), axis=-1)


def select_scatter(w: OnnxWriter, x: OnnxValue, new: OnnxValue, dim: int, index: int) -> str:
    index = index % x.size(dim)
    row = w.call("Unsqueeze", w.cast(new, x.dtype), w.integers([dim % len(x.shape)]))
    return replaced(w, x, row, dim, index, index + 1)


def slice_scatter(
    w: OnnxWriter,
    x: OnnxValue,
    new: OnnxValue,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    places = range(x.size(dim))[slice(start, end, step)]
    if step != 1 or not places:
        raise NoOnnxForm("slice_scatter with steps, or of nothing")
    return replaced(w, x, w.cast(new, x.dtype), dim, places[0], places[-1] + 1)


def replaced(w: OnnxWriter, x: OnnxValue, new: str, dim: int, start: int, end: int) -> str:
    before = [sliced(w, x, dim, 0, start)] if start else []
    behind = [sliced(w, x, dim, end)] if end < x.size(dim) else []
    return w.call("Concat", *before, new, *behind, axis=dim)


def one_of_each_window(channels: int, kernel: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Filters [channels * taps, 1, *kernel], of which each picks one tap."""
    taps = math.prod(kernel)
    return torch.eye(taps, dtype=dtype).reshape(taps, 1, *kernel).repeat(channels, 1, 1, 1)


def image_to_columns(w: OnnxWriter, x: OnnxValue, kernel: Any, dilation: Any, padding: Any, stride: Any) -> str:
    """im2col as a convolution whose filters pick one element each."""
    if len(x.shape) != 4:
        raise NoOnnxForm("im2col without a batch")
    taps = per_axis(kernel, 2)
    picked = w.call(
        "Conv",
        x,
        w.tensor(one_of_each_window(x.size(1), taps, x.dtype)),
        kernel_shape=taps,
        dilations=per_axis(dilation, 2),
        pads=per_axis(padding, 2) * 2,
        strides=per_axis(stride, 2),
        group=x.size(1),
    )
    return in_shape(w, picked)


def columns_to_image(
    w: OnnxWriter, x: OnnxValue, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any
) -> str:
    """col2im as the transposed convolution of the one above."""
    if len(x.shape) != 3:
        raise NoOnnxForm("col2im without a batch")
    taps, dilations, pads, strides = (per_axis(each, 2) for each in (kernel, dilation, padding, stride))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, taps, strict=True)]
    room = [s + 2 * p - r for s, p, r in zip(size, pads, reach, strict=True)]
    counts = [r // step + 1 for r, step in zip(room, strides, strict=True)]
    channels = x.size(1) // math.prod(taps)
    planes = w.call("Reshape", x, w.integers([-1, x.size(1), *counts]))
    return w.call(
        "ConvTranspose",
        planes,
        w.tensor(one_of_each_window(channels, taps, x.dtype)),
        kernel_shape=taps,
        dilations=dilations,
        pads=pads * 2,
        strides=strides,
        output_padding=[r % step for r, step in zip(room, strides, strict=True)],
        group=channels,
    )


def unpooled(w: OnnxWriter, x: OnnxValue, index: OnnxValue, size: Sequence[int]) -> str:
    """max_unpool2d: each value to its place in its plane."""
    if len(x.shape) != 4:
        raise NoOnnxForm("max_unpool2d without a batch")
    channels, plane = x.size(1), math.prod(x.sizes(2, 3))
    values, places = (w.call("Reshape", each, w.integers([-1, channels, plane])) for each in (x, index))
    count = w.call("Shape", x, start=0, end=1)
    shape = w.call("Concat", count, w.integers([channels, math.prod(size)]), axis=0)
    nothing = w.call("Expand", w.number(0.0, x.dtype), shape)
    return in_shape(w, w.call("ScatterElements", nothing, places, values, axis=2))


def triangle(upper: int) -> Callable[..., str]:
    return lambda w, x, diagonal=0: w.call("Trilu", x, w.number(diagonal, torch.int64), upper=upper)


FORMS: dict[str, Callable[..., Any]] = {
    "aten.slice.Tensor": sliced,
    "aten.narrow.default": narrow,
    "aten.select.int": select,
    "aten.index_select.default": index_select,
    "aten.embedding.default": embedding,
    "aten.gather.default": gather,
    "aten.index.Tensor": indexed,
    "aten.roll.default": rolled,
    "aten.flip.default": flipped,
    "aten.rot90.default": quarter_turns,
    "aten.pixel_shuffle.default": pixel_shuffle,
    "aten.pixel_unshuffle.default": pixel_unshuffle,
    "aten.channel_shuffle.default": channel_shuffle,
    "aten.unfold.default": windows,
    "aten.diagonal.default": diagonal,
    "aten.one_hot.default": one_hot,
    "aten.select_scatter.default": select_scatter,
    "aten.slice_scatter.default": slice_scatter,
    "aten.im2col.default": image_to_columns,
    "aten.col2im.default": columns_to_image,
    "aten.max_unpool2d.default": unpooled,
    "aten.tril.default": triangle(0),
    "aten.triu.default": triangle(1),
}
