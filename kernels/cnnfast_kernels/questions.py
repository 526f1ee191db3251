"""Which kernel and tile shall serve this convolution, and who this residual block? The questions, and all that their
answers follow from: layouts alone, so that nothing here touches a tensor. choosing.py answers the first, a measured row
(tables.py) the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from . import devices, tables
from .dtypes import accumulator_dtype
from .gather.depthwise.tiles import StripTile
from .gather.stem import run_problem, why_no_packing
from .gradient_epilogue import NOTHING_BELOW, GradientLayouts
from .layout import Layout, convolution_format, dense
from .problem import ConvProblem
from .tiling import Operation, PackedTile, Precision, TileConfig, precision_class
from .tma.stem import boxed_packing, is_packed
from .tma.tiles import BoxTile
from .tma.views import flattened, why_not

# The tile of a general kernel, on an image as it lies or packed, of one for depthwise convolution, and of one that
# loads by tensor maps.
Tile = TileConfig | PackedTile | StripTile | BoxTile
# What a kernel has to do with the statistics of a batch norm: nothing; "stats": a forward kernel leaves those of its
# result; "norm": it normalises by given ones; "sums": a gradient's kernel leaves the sums that a norm's gradients need.
Statistics = Literal["", "stats", "norm", "sums"]


class Geometry(NamedTuple):
    """How the filters move over the image."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def problem(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> ConvProblem:
        return ConvProblem.of(tuple(x_shape), tuple(w_shape), *self)


def precision_of(dtype: torch.dtype, tf32: bool) -> Precision:
    return precision_class(str(dtype).removeprefix("torch."), tf32)


class Question(NamedTuple):
    """Which kernel and tile shall serve this convolution? All that the answer follows from.

    x, w, y: of the operands and the result; of a gradient, where it stands for what it is the gradient of. aligned:
    whether both operands, the residual and what lies below start at multiples of 16 bytes. below: what the epilogue of
    a gradient reads beside its residual (gradient_epilogue.py); words: whether words of bits tell its mask. second: x
    of its second product (second_product.py).
    """

    operation: Operation
    problem: ConvProblem
    tf32: bool
    gpu: devices.Gpu
    aligned: bool
    x: Layout
    w: Layout
    y: Layout
    statistics: Statistics = ""
    residual: Layout | None = None
    activation: str | None = None
    below: GradientLayouts = NOTHING_BELOW
    words: bool = False
    second: Layout | None = None

    @property
    def precision(self) -> Precision:
        return precision_of(self.x.dtype, self.tf32)

    @property
    def key(self) -> tables.Key:
        residual = "" if self.residual is None else "residual"
        words = self.statistics, residual, self.activation
        if self.operation == "dgrad":
            second = "" if self.second is None else "second product"
            words = second, residual, self.activation, self.mask, self.statistics
        epilogue = " ".join(filter(None, words))
        dtype = "tf32" if self.tf32 else str(self.x.dtype).removeprefix("torch.")
        layout = " ".join("NHWC" if _adjacent(t) else "NCHW" for t in (self.x, self.w, self.y))
        return tables.Key(*self.gpu, self.operation, epilogue, dtype, layout, self.problem)

    @property
    def mask(self) -> str:
        """Of the epilogue of a gradient, what tells the activation's derivative: "words", "z", or "" for y."""
        return "words" if self.words else "z" if self.below.z is not None else ""

    @property
    def finished(self) -> bool:
        """Whether the kernel is that of an image's gradient, and has an epilogue."""
        return self.operation == "dgrad" and bool(self.statistics or self.residual or self.activation)

    @property
    def adjacent(self) -> bool:
        """Whether channels are adjacent in both operands."""
        operands = {"fprop": (self.x, self.w), "dgrad": (self.y, self.w), "wgrad": (self.x, self.y)}[self.operation]
        return all(map(_adjacent, operands))

    @property
    def result(self) -> Layout:
        """Of what the operation computes."""
        return {"fprop": self.y, "dgrad": self.x, "wgrad": self.w}[self.operation]

    @property
    def channels_last(self) -> bool:
        """Whether channels are adjacent in every tensor that is read or written."""
        return all(map(_adjacent, (*self.images, self.w)))

    @property
    def images(self) -> list[Layout]:
        rest = self.residual, self.below.y, self.below.z, self.second
        return [self.x, self.y, *[t for t in rest if t is not None]]

    @property
    def packed(self) -> bool:
        """Whether the tensor-map kernels would pack the image and the filters first (tma/stem.py)."""
        return self.operation != "dgrad" and is_packed(self.problem)

    @property
    def boxed(self) -> ConvProblem:
        """The convolution as the tensor-map kernels see it."""
        if not self.packed:
            return flattened(self.problem, *self.images)[0]
        packing = boxed_packing(self.problem, self.x.dtype)
        return flattened(packing.problem, packing.x, *self.images[1:])[0]

    @property
    def why_no_packing(self) -> str:
        """Why the kernels that load by pointers cannot serve on a packed image (gather/stem.py); "" if they can."""
        if self.operation == "dgrad":
            return "there is no image to pack"
        return why_no_packing(self.problem, self.precision, self.x.dtype)

    @property
    def packed_how(self) -> tuple[ConvProblem, Operation, Precision, bool, int]:
        """What tiles on a packed image are chosen by. Of what is packed, channels are adjacent."""
        adjacent = self.operation == "fprop" or _adjacent(self.y)
        return run_problem(self.problem, self.x.dtype), self.operation, self.precision, adjacent, self.gpu.arch

    @property
    def why_no_boxes(self) -> str:
        """Why the tensor-map kernels cannot serve; "" if they can."""
        weights = [] if self.operation == "wgrad" else [self.w]
        seen = self.images[1:] if self.packed else [*self.images, *weights]
        return why_not(self.problem, self.precision, self.gpu.arch, self.aligned, *seen)


class BlockQuestion(NamedTuple):
    """Who shall serve this residual block in training, all its convolutions alike?

    layers: (shape and strides of the filters, geometry) of each, those of the branch first, `branch` of them, and then
    that of the shortcut, if it has one. Calls make it, and an answer is kept by it: so it is flat.
    """

    gpu: devices.Gpu
    dtype: torch.dtype
    tf32: bool
    x_shape: tuple[int, ...]
    x_strides: tuple[int, ...]
    branch: int
    layers: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], ...]

    @property
    def problems(self) -> tuple[ConvProblem, ...]:
        found: list[ConvProblem] = []
        for i, (w_shape, _, geometry) in enumerate(self.layers):
            before = found[-1] if 0 < i < self.branch else None
            image = self.x_shape if before is None else (before.N, before.K, before.P, before.Q)
            found.append(ConvProblem.of(tuple(image), tuple(w_shape), *geometry))
        return tuple(found)

    @property
    def key(self) -> tables.BlockKey:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        laid = (self.x_shape, self.x_strides), *((shape, strides) for shape, strides, _ in self.layers)
        layout = " ".join("NHWC" if _adjacent(Layout(*each, self.dtype)) else "NCHW" for each in laid)
        projection = len(self.layers) > self.branch
        return tables.BlockKey(*self.gpu, dtype, layout, projection, self.problems)


def _adjacent(t: Layout) -> bool:
    return t.stride(1) == 1 or t.shape[1] == 1


def fprop_question(
    x: Layout,
    w: Layout,
    geometry: Geometry,
    gpu: devices.Gpu,
    *,
    statistics: Statistics = "",
    residual_strides: tuple[int, ...] | None = None,
    activation: str | None = None,
    tf32: bool = False,
    aligned: bool = True,
) -> Question:
    g = geometry.problem(x.shape, w.shape)
    y = dense((g.N, g.K, g.P, g.Q), x.dtype, convolution_format(x, w))
    residual = None if residual_strides is None else Layout(y.shape, residual_strides, x.dtype)
    return Question("fprop", g, tf32, gpu, aligned, x, w, y, statistics, residual, activation)


def dgrad_question(
    dy: Layout,
    w: Layout,
    x_shape: Sequence[int],
    fmt: torch.memory_format,
    geometry: Geometry,
    gpu: devices.Gpu,
    *,
    sums: bool = False,
    below: GradientLayouts = NOTHING_BELOW,
    activation: str | None = None,
    words: bool = False,
    second: Layout | None = None,
    tf32: bool = False,
    aligned: bool = True,
) -> Question:
    """fmt: the format of the gradient of x. sums: whether the kernel shall leave sums; below, activation and words: of
    its epilogue (gradient_epilogue.py); second: x of its second product (second_product.py).
    """
    dx = dense(x_shape, dy.dtype, fmt)
    statistics: Statistics = "sums" if sums else ""
    return Question(
        "dgrad", geometry.problem(x_shape, w.shape), tf32, gpu, aligned, dx, w, dy, statistics, below.residual,
        activation, below._replace(residual=None), words, second,
    )  # fmt: skip


def wgrad_question(
    x: Layout,
    dy: Layout,
    w_shape: Sequence[int],
    fmt: torch.memory_format,
    geometry: Geometry,
    gpu: devices.Gpu,
    *,
    tf32: bool = False,
    aligned: bool = True,
    wide: bool = False,
) -> Question:
    """fmt: the format of the gradient of w. wide: it is in the dtype of its sums, not in that of x."""
    dw = dense(w_shape, accumulator_dtype(x.dtype) if wide else x.dtype, fmt)
    return Question("wgrad", geometry.problem(x.shape, w_shape), tf32, gpu, aligned, x, dw, dy)
