"""Pools and resizing in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .onnx_layers import Pair, per_axis
from .onnx_writer import NoOnnxForm, OnnxValue, OnnxWriter


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


def max_pool(axes: int) -> Callable[..., str]:
    def form(
        w: OnnxWriter,
        x: OnnxValue,
        kernel: Pair,
        stride: Pair = (),
        padding: Pair | int = 0,
        dilation: Pair | int = 1,
        ceil_mode: bool = False,
    ) -> str:
        windows = Windows(x, w.result.shape[-axes:], kernel, stride, padding, dilation)

        def pool(image: OnnxValue | str) -> str:
            pads = [*windows.padding, *windows.behind]
            if any(pad >= taps for pad, taps in zip(pads, windows.kernel * 2, strict=True)):  # runtimes refuse it
                image, pads = padded_image(w, image, pads[:axes], pads[axes:], -math.inf, x.dtype), [0] * len(pads)
            return w.call("MaxPool", image, dilations=windows.dilation, **windows.attributes(pads))

        return in_batch(w, x, axes, pool)

    return form


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


def adaptive_max_pool(axes: int) -> Callable[..., list[str]]:
    def form(w: OnnxWriter, x: OnnxValue, output_size: Pair) -> list[str]:
        before, after = image_sizes(x, axes), w.result[0].shape[-axes:]
        if any(size % result for size, result in zip(before, after, strict=True)):
            raise NoOnnxForm(f"adaptive max pooling of {list(before)} to {list(after)}, which do not divide")
        windows = [size // result for size, result in zip(before, after, strict=True)]
        y = in_batch(w, x, axes, lambda image: w.call("MaxPool", image, kernel_shape=windows, strides=windows))
        return [y, ""]

    return form


def axis_weights(operator: Any, axes: int, axis: int, before: int, after: int, options: Sequence[Any]) -> Tensor:
    """[before, after]: how much of each element of a row each element of the resized row has. PyTorch's own operator,
    of the rows of the identity matrix, gives them.
    """
    *aligned, factors = options
    rows = torch.eye(before).view(1, before, *[1] * (axes - 1), before)
    ones = [1] * (axes - 1)
    given = (None, *aligned, [*map(float, ones), factors[axis]]) if factors else ([*ones, after], *aligned, None)
    return operator(rows, *given).reshape(before, after)


def resized(operator: Any, axes: int) -> Callable[..., str]:
    """upsample_*.vec. options: align_corners where there is one, and the factors where the sizes are not given.
    Nearest picks elements and linear has an operator in ONNX; cubic, and antialiased, are a product with a matrix of
    weights for each axis.
    """
    nearest, linear = "nearest" in str(operator), axes > 1 and str(operator).endswith(f"linear{axes}d.vec")

    def form(w: OnnxWriter, x: OnnxValue, size: Any, *options: Any) -> str:
        before, after, factors = image_sizes(x, axes), list(w.result.shape[-axes:]), options[-1]
        exact = not factors or all(b * f == a for b, f, a in zip(before, factors, after, strict=True))
        whole = exact and not any(a % b for b, a in zip(before, after, strict=True))
        if nearest and whole and "exact" not in str(operator):
            scales = [a / b for b, a in zip(before, after, strict=True)]
            return resize(w, x, scales, mode="nearest", coordinates="asymmetric", nearest_mode="floor")
        if linear and (exact or options[0]):
            where = "align_corners" if options[0] else "half_pixel"
            return resize(w, x, after, mode="linear", coordinates=where)
        y = x.name
        for axis in range(axes):
            if before[axis] == after[axis] and not factors:
                continue
            weights = axis_weights(operator, axes, axis, before[axis], after[axis], options)
            if nearest:
                y = w.call("Gather", y, w.tensor(weights.argmax(0)), axis=axis + 2)
            else:
                y = along_axis(w, y, axes + 2, axis + 2, weights)
        return y

    return form


def resize(w: OnnxWriter, x: OnnxValue, to: Sequence[float], mode: str, coordinates: str, **more: Any) -> str:
    """to: the sizes of the image, or as floats the factors."""
    factors = isinstance(to[0], float)
    if factors:
        inputs = [x, None, w.number([1.0, 1.0, *to], torch.float32)]
    else:
        inputs = [x, None, None, w.integers(to)]
        more["axes"] = list(range(2, len(x.shape)))
    return w.call("Resize", *inputs, mode=mode, coordinate_transformation_mode=coordinates, **more)


UPSAMPLES = {
    1: ("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d"),
    2: ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    3: ("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d"),
}  # fmt: skip
FORMS: dict[str, Callable[..., Any]] = {
    **{f"aten.max_pool{axes}d.default": max_pool(axes) for axes in (1, 2, 3)},
    **{f"aten.avg_pool{axes}d.default": average_pool(axes) for axes in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{axes}d.default": adaptive_average_pool(axes) for axes in (1, 2, 3)},
    **{f"aten.adaptive_max_pool{axes}d.default": adaptive_max_pool(axes) for axes in (1, 2, 3)},
    **{
        f"aten.{name}.vec": resized(getattr(torch.ops.aten, name).vec, axes)
        for axes, names in UPSAMPLES.items()
        for name in names
    },
}
