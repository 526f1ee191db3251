"""How tensors are seen through tensor maps, and which tensors can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from ..layout import Laid, Layout
from ..problem import ConvProblem
from ..tiling import Operation, Precision
from .tiles import BoxTile, box_phases

ALIGNMENT = 8  # elements of 16 bits in the 16 bytes that a tensor map can start at, and step by


def strides_of(t: Laid) -> tuple[int, int, int]:
    """(n, h, w): strides of a tensor [N, C, H, W] whose channels are adjacent.

    PyTorch may give any stride to an axis of one pixel; here it is the stride that a dense tensor would have.
    """
    N, C, H, W = t.shape
    n, _, h, w = t.stride()
    w = w if W > 1 else C
    h = h if H > 1 else W * w
    return n if N > 1 else H * h, h, w


def is_mappable(t: Laid) -> bool:
    """Whether channels are adjacent, and pixels, rows and images are multiples of 16 bytes apart and do not overlap."""
    _, C, H, W = t.shape
    n, h, w = strides_of(t)
    aligned = C % ALIGNMENT == n % ALIGNMENT == h % ALIGNMENT == w % ALIGNMENT == 0
    return aligned and (C == 1 or t.stride(1) == 1) and w >= C and h >= W * w and n >= H * h


def why_not_on(arch: int) -> str:
    """Why no tensor-map kernel runs on GPUs of an architecture (90 for sm_90), or "" if they do."""
    if arch < 90:
        return f"sm_{arch} has no tensor maps"
    if arch >= 120:
        return f"sm_{arch} has too little shared memory, and neither wgmma nor tcgen05"
    return ""


def why_not(problem: ConvProblem, precision: Precision, arch: int, aligned: bool, *tensors: Laid) -> str:
    """Why the tensor-map kernels cannot serve a convolution on these tensors, or "" if they can.

    tensors: the result among them. aligned: whether all of them start at a multiple of 16 bytes.
    """
    g = problem
    if reason := why_not_on(arch):
        return reason
    if precision != "half":
        return "operands are not in half precision"
    if g.groups > 1:
        return "there are groups"
    if 0 in (g.N, g.C, g.H, g.W, g.K, g.R, g.S) or min(g.P, g.Q) < 1:
        return "a tensor is empty"
    if not aligned:
        return "a tensor does not start at a multiple of 16 bytes"
    if not all(map(is_mappable, tensors)):
        return "a tensor is not channels_last, with its channels and strides multiples of 8"
    return ""


def flattened(problem: ConvProblem, *images: Laid) -> tuple[ConvProblem, Sequence[Laid]]:
    """The problem and its images as the kernels see them.

    A 1x1 convolution of images without gaps between rows is seen as one of a single long row: that is a plain GEMM,
    whose boxes waste no pixel. Any other stays as it is.
    """
    g = problem
    gaps = ((n, h) != (t.shape[2] * h, t.shape[3] * w) for t in images for n, h, w in [strides_of(t)])
    if not g.is_pointwise or any(gaps):
        return problem, images
    row = g.N * g.H * g.W
    pixels = [strides_of(t)[2] for t in images]
    rows = [
        Layout((1, t.shape[1], 1, row), (row * w, 1, row * w, w), t.dtype) for t, w in zip(images, pixels, strict=True)
    ]
    return replace(g, N=1, H=1, W=row, P=1, Q=row), rows


class Phases(NamedTuple):
    """How a kernel sees an image that its convolution strides over: in h phases of rows and w of columns (boxes.py).

    pixel: elements from one pixel of the image to the next.
    """

    h: int
    w: int
    pixel: int


def phases_of(problem: ConvProblem, operation: Operation, tile: BoxTile, image: Laid) -> Phases:
    """The phases in which the tile's boxes see x, or in dgrad dx.

    Raises ValueError where the boxes cannot step with the stride, which only a tile that a caller named may do.
    """
    g, phases = problem, box_phases(problem, operation, tile)
    if phases is None:
        raise ValueError(
            f"tile={tile} cannot step with stride {g.stride_h}x{g.stride_w} over {g.C} channels of {g.H}x{g.W} pixels: "
            "use boxes of one row and one column, or channels and pixels that its blocks and the stride divide"
        )
    return Phases(*phases, strides_of(image)[2])


def map_image(t: Laid, pixels: tuple[int, int, int], channels: int, phases: Phases | None = None) -> TensorDescriptor:
    """t as [N, H, W, C], or in phases as [N, H / phases.h, phases.h, W / phases.w, phases.w * C].

    pixels: how many images, rows and columns a box has.
    """
    N, C, H, W = t.shape
    n, h, w = strides_of(t)
    images, rows, columns = pixels
    if phases is None or phases.h * phases.w == 1:
        return launch.tensor_map((N, H, W, C), (n, h, w, 1), (images, rows, columns, channels), t.dtype)
    shape = N, H // phases.h, phases.h, W // phases.w, (phases.w - 1) * w + C
    strides = n, phases.h * h, h, phases.w * w, 1
    return launch.tensor_map(shape, strides, (images, rows, 1, columns, channels), t.dtype)


def map_column(t: Laid, pixels: tuple[int, int, int], channels: int) -> TensorDescriptor:
    """t as [H, W, N, C], for boxes of one pixel of several images."""
    N, C, H, W = t.shape
    n, h, w = strides_of(t)
    return launch.tensor_map((H, W, N, C), (h, w, n, 1), (1, 1, pixels[0], channels), t.dtype)


def map_filters(w: Laid, filters: int, channels: int) -> TensorDescriptor:
    """Weights [K, C, R, S] as [R, S, K, C]: the block of one tap."""
    K, C, R, S = w.shape
    k, r, s = strides_of(w)
    return launch.tensor_map((R, S, K, C), (r, s, k, 1), (1, 1, filters, channels), w.dtype)
