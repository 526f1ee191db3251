"""Images in another size, and grids over images, in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .onnx_pools import along_axis, image_sizes
from .onnx_shapes import in_shape
from .onnx_sizes import NoOnnxForm
from .onnx_writer import OnnxValue, OnnxWriter


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


def affine_grid(w: OnnxWriter, theta: OnnxValue, size: Sequence[Any], align_corners: bool) -> str:
    """The places of the identity's grid, with a 1 behind each, times theta [N, axes, axes + 1]."""
    axes = len(size) - 2
    image = [each for each in size[2:] if isinstance(each, int)]
    if len(image) != axes:
        raise NoOnnxForm("a grid whose size depends on the batch")
    identity = torch.eye(axes, axes + 1, dtype=theta.dtype)[None]
    places = torch.ops.aten.affine_grid_generator(identity, [1, 1, *image], align_corners).reshape(1, -1, axes)
    base = torch.cat([places, torch.ones_like(places[..., :1])], -1)
    return in_shape(w, w.call("MatMul", w.tensor(base), w.call("Transpose", theta, perm=[0, 2, 1])))


UPSAMPLES = {
    1: ("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d"),
    2: ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    3: ("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d"),
}  # fmt: skip
FORMS: dict[str, Callable[..., Any]] = {
    **{
        f"aten.{name}.vec": resized(getattr(torch.ops.aten, name).vec, axes)
        for axes, names in UPSAMPLES.items()
        for name in names
    },
    "aten.affine_grid_generator.default": affine_grid,
}
