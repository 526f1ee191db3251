"""Pools in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .onnx_layers import Pair, per_axis
from .onnx_sizes import NoOnnxForm
from .onnx_writer import OnnxValue, OnnxWriter


def image_sizes(x: OnnxValue, axes: int) -> list[int]:
    return x.sizes(*range(len(x.shape) - axes, len(x.shape)))


def in_batch(w: OnnxWriter, x: OnnxValue, axes: int, pool: Callable[[OnnxValue | str], str]) -> str:
    """PyTorch's pools take images without a batch too."""
    if len(x.shape) == axes + 2:
        return pool(x)
    return w.call("Squeeze", pool(w.call("Unsqueeze", x, w.integers([0]))), w.integers([0]))


class Windows:
    """Where the windows of a pool lie. ceil_mode is written as padding behind the image: what ONNX and its runtimes
    mean by ceil_mode has changed, and PyTorch leaves a last window out that would begin in the padding.
    """

    def __init__(self, x: OnnxValue, results: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any = 1):
        axes = len(results)
        self.kernel = per_axis(kernel, axes)
        self.stride = per_axis(stride, axes) if stride else self.kernel
        self.padding, self.dilation = per_axis(padding, axes), per_axis(dilation, axes)
        self.behind = []
        geometry = zip(
            image_sizes(x, axes), results, self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        for size, result, taps, step, pad, dil in geometry:
            reach = dil * (taps - 1) + 1
            as_padded = (size + 2 * pad - reach) // step + 1 == result
            self.behind.append(pad if as_padded else (result - 1) * step + reach - size - pad)

    def attributes(self, pads: Sequence[int]) -> dict[str, Any]:
        return {"kernel_shape": self.kernel, "strides": self.stride, "pads": list(pads)}


def padded_image(
    w: OnnxWriter, x: OnnxValue | str, before: Pair, behind: Pair, value: float, dtype: torch.dtype
) -> str:
    return w.call("Pad", x, w.integers([0, 0, *before, 0, 0, *behind]), w.number(value, dtype))


def pooled_with_places(w: OnnxWriter, x: OnnxValue, image: OnnxValue | str, **attributes: Any) -> tuple[str, str]:
    """The largest of each window, and its place in its plane; ONNX counts from the beginning of the tensor. Places that
    nobody asks for are not written: runtimes are slower with them.
    """
    if 1 not in w.wanted:
        return w.call("MaxPool", image, **attributes), ""
    y, places = w.calls("MaxPool", image, outputs=2, **attributes)
    plane = math.prod(image_sizes(x, len(attributes["kernel_shape"])))
    return y, w.call("Mod", places, w.number(plane, torch.int64))


def max_pool_with_places(axes: int) -> Callable[..., tuple[str, str]]:
    def form(
        w: OnnxWriter,
        x: OnnxValue,
        kernel: Pair,
        stride: Pair = (),
        padding: Pair | int = 0,
        dilation: Pair | int = 1,
        ceil_mode: bool = False,
    ) -> tuple[str, str]:
        results = w.result[0] if isinstance(w.result, list) else w.result
        windows = Windows(x, results.shape[-axes:], kernel, stride, padding, dilation)
        batched = len(x.shape) == axes + 2
        image: OnnxValue | str = x if batched else w.call("Unsqueeze", x, w.integers([0]))
        pads = [*windows.padding, *windows.behind]
        if any(pad >= taps for pad, taps in zip(pads, windows.kernel * 2, strict=True)):  # runtimes refuse it
            if 1 in w.wanted:
                raise NoOnnxForm("the places of a max pool with more padding than window")
            image, pads = padded_image(w, image, pads[:axes], pads[axes:], -math.inf, x.dtype), [0] * len(pads)
        found = pooled_with_places(w, x, image, dilations=windows.dilation, **windows.attributes(pads))
        if batched:
            return found
        largest, places = (name and w.call("Squeeze", name, w.integers([0])) for name in found)
        return largest, places

    return form


def max_pool(axes: int) -> Callable[..., str]:
    both = max_pool_with_places(axes)
    return lambda w, *arguments: both(w, *arguments)[0]


def average_pool(axes: int) -> Callable[..., str]:
    def form(
        w: OnnxWriter,
        x: OnnxValue,
        kernel: Pair,
        stride: Pair = (),
        padding: Pair | int = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> str:
        """PyTorch divides by the elements in the padded image, those behind it left out: as ONNX does where the
        padding counts as image.
        """
        windows = Windows(x, w.result.shape[-axes:], kernel, stride, padding)
        nothing = [0] * axes

        def pool(image: OnnxValue | str) -> str:
            before, behind, counted = windows.padding, windows.behind, count_include_pad
            if divisor_override:
                counted = True
            elif counted and behind != before:
                image = padded_image(w, image, before, before, 0, x.dtype)
                before, behind, counted = nothing, [e - p for e, p in zip(behind, before, strict=True)], False
            attributes = windows.attributes([*before, *behind])
            y = w.call("AveragePool", image, count_include_pad=int(counted), **attributes)
            if divisor_override:
                y = w.call("Mul", y, w.number(math.prod(windows.kernel) / divisor_override, x.dtype))
            return y

        return in_batch(w, x, axes, pool)

    return form


def along_axis(w: OnnxWriter, x: OnnxValue | str, rank: int, axis: int, matrix: Tensor) -> str:
    """Each row of x along the axis, times the matrix [size before, size after]."""
    if axis == rank - 1:
        return w.call("MatMul", x, w.tensor(matrix))
    if axis == rank - 2:
        return w.call("MatMul", w.tensor(matrix.t()), x)
    order = [*(dim for dim in range(rank) if dim != axis), axis]
    back = [order.index(dim) for dim in range(rank)]
    return w.call("Transpose", w.call("MatMul", w.call("Transpose", x, perm=order), w.tensor(matrix)), perm=back)


def adaptive_average_pool(axes: int) -> Callable[..., str]:
    def form(w: OnnxWriter, x: OnnxValue, output_size: Pair) -> str:
        """Windows of one size are a pool; others are a product with a matrix of averages for each axis."""
        before, after = image_sizes(x, axes), w.result.shape[-axes:]

        def pool(image: OnnxValue | str) -> str:
            if all(size == 1 for size in after):
                return w.call("GlobalAveragePool", image)
            if tuple(before) == tuple(after):
                return image if isinstance(image, str) else image.name
            if not any(size % result for size, result in zip(before, after, strict=True)):
                windows = [size // result for size, result in zip(before, after, strict=True)]
                return w.call("AveragePool", image, kernel_shape=windows, strides=windows)
            for axis, (size, result) in enumerate(zip(before, after, strict=True)):
                if size != result:
                    matrix = F.adaptive_avg_pool1d(torch.eye(size, dtype=x.dtype), result)
                    image = along_axis(w, image, axes + 2, axis + 2, matrix)
            return image if isinstance(image, str) else image.name

        return in_batch(w, x, axes, pool)

    return form


def adaptive_max_pool(axes: int) -> Callable[..., tuple[str, str]]:
    def form(w: OnnxWriter, x: OnnxValue, output_size: Pair) -> tuple[str, str]:
        """Windows of one size are a pool; others pick their elements, the last one again in those that are shorter."""
        before, after = image_sizes(x, axes), w.result[0].shape[-axes:]
        if len(x.shape) == axes + 2 and not any(a % b for a, b in zip(before, after, strict=True)):
            window = [size // result for size, result in zip(before, after, strict=True)]
            return pooled_with_places(w, x, x, kernel_shape=window, strides=window)
        if 1 in w.wanted:
            raise NoOnnxForm(f"the places of adaptive max pooling from {list(before)} to {list(after)}")
        y = x.name
        for axis, (size, result) in enumerate(zip(before, after, strict=True), len(x.shape) - axes):
            starts = torch.arange(result) * size // result
            last = ((torch.arange(result) + 1) * size + result - 1) // result - 1
            widest = int((last - starts).max()) + 1
            places = torch.minimum(starts[:, None] + torch.arange(widest), last[:, None])
            picked = w.call("Gather", y, w.tensor(places), axis=axis)
            y = w.call("ReduceMax", picked, w.integers([axis + 1]), keepdims=0)
        return y, ""

    return form


FORMS: dict[str, Callable[..., Any]] = {
    **{f"aten.max_pool{axes}d.default": max_pool(axes) for axes in (1, 2, 3)},
    "aten.max_pool2d_with_indices.default": max_pool_with_places(2),
    **{f"aten.avg_pool{axes}d.default": average_pool(axes) for axes in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{axes}d.default": adaptive_average_pool(axes) for axes in (1, 2, 3)},
    **{f"aten.adaptive_max_pool{axes}d.default": adaptive_max_pool(axes) for axes in (1, 2, 3)},
}
