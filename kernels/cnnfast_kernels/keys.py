"""What the plans of convolutions are kept by: all that a plan follows from, which is everything about a call but what
its tensors hold.

A key is made in every call, which has to be quick. So keys are flat and hold what tensors already have, and the
functions that make them take positions and go around NamedTuple's own constructor, which is a Python function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import devices
from .epilogue import Epilogue, Finish, finish_of
from .gradient_epilogue import NO_EPILOGUE, GradientEpilogue, GradientLayouts, check_gradient_epilogue
from .layout import Laid, Layout
from .questions import Geometry, Question, Statistics, Tile, dgrad_question, fprop_question, wgrad_question
from .second_product import SecondProduct, check_second_product

Shape = tuple[int, ...]


class FpropKey(NamedTuple):
    """Of a forward pass. tile: the one to run; None: the choice. `aligned` as in Question. words: whether words of
    bits of the result are asked for.
    """

    x_shape: Shape
    x_strides: Shape
    w_shape: Shape
    w_strides: Shape
    residual_strides: Shape | None
    dtype: torch.dtype
    geometry: Geometry
    statistics: Statistics
    eps: float
    activation: str | None
    slope: float
    one_slope: bool
    tf32: bool
    tile: Tile | None
    gpu: devices.Gpu
    aligned: bool
    words: bool = False

    @property
    def finish(self) -> Finish:
        return finish_of(self.dtype, self.eps, self.activation, self.slope, self.one_slope)

    @property
    def question(self) -> Question:
        x, w = Layout(self.x_shape, self.x_strides, self.dtype), Layout(self.w_shape, self.w_strides, self.dtype)
        return fprop_question(
            x, w, self.geometry, self.gpu, statistics=self.statistics, residual_strides=self.residual_strides,
            activation=self.activation, tf32=self.tf32, aligned=self.aligned,
        )  # fmt: skip


class BelowKey(NamedTuple):
    """Of the epilogue of a gradient: strides of what it reads, whether words of bits are among that, and its sums."""

    residual_strides: Shape | None
    y_strides: Shape | None
    z_strides: Shape | None
    words: bool
    eps: float
    activation: str | None
    slope: float
    sums: bool

    def layouts(self, shape: Shape, dtype: torch.dtype) -> GradientLayouts:
        strides = self.residual_strides, self.y_strides, self.z_strides
        residual, y, z = (None if s is None else Layout(shape, s, dtype) for s in strides)
        return GradientLayouts(residual, y, z)


class DgradKey(NamedTuple):
    """Of the gradient with respect to x, in the format fmt. below: None where there is no epilogue. second_strides: of
    x of a second product, if there is one.
    """

    dy_shape: Shape
    dy_strides: Shape
    w_shape: Shape
    w_strides: Shape
    dtype: torch.dtype
    x_shape: Shape
    fmt: torch.memory_format
    geometry: Geometry
    tf32: bool
    tile: Tile | None
    gpu: devices.Gpu
    aligned: bool
    below: BelowKey | None = None
    second_strides: Shape | None = None

    @property
    def finish(self) -> Finish | None:
        below = self.below
        return below and finish_of(self.dtype, below.eps, below.activation, below.slope)

    @property
    def question(self) -> Question:
        dy, w = Layout(self.dy_shape, self.dy_strides, self.dtype), Layout(self.w_shape, self.w_strides, self.dtype)
        how = self.x_shape, self.fmt, self.geometry, self.gpu
        strides = self.second_strides
        second = None if strides is None else Layout(self.x_shape, strides, self.dtype)
        if (below := self.below) is None:
            return dgrad_question(dy, w, *how, second=second, tf32=self.tf32, aligned=self.aligned)
        return dgrad_question(
            dy, w, *how, sums=below.sums, below=below.layouts(self.x_shape, self.dtype), second=second,
            activation=below.activation, words=below.words, tf32=self.tf32, aligned=self.aligned,
        )  # fmt: skip


class WgradKey(NamedTuple):
    """Of the gradient with respect to w, in the format fmt. wide: in the dtype of its sums, not in that of x."""

    x_shape: Shape
    x_strides: Shape
    dy_shape: Shape
    dy_strides: Shape
    dtype: torch.dtype
    w_shape: Shape
    fmt: torch.memory_format
    geometry: Geometry
    tf32: bool
    tile: Tile | None
    gpu: devices.Gpu
    aligned: bool
    wide: bool = False

    @property
    def question(self) -> Question:
        x, dy = Layout(self.x_shape, self.x_strides, self.dtype), Layout(self.dy_shape, self.dy_strides, self.dtype)
        how = self.w_shape, self.fmt, self.geometry, self.gpu
        return wgrad_question(x, dy, *how, tf32=self.tf32, aligned=self.aligned, wide=self.wide)


def fprop_key(
    x: Laid,
    w: torch.Tensor,
    geometry: Geometry,
    epilogue: Epilogue,
    stats: bool,
    tf32: bool,
    tile: Tile | None,
    words: bool = False,
) -> FpropKey:
    """x: a Layout where it is not computed yet. stats: whether the kernel shall leave the moments of its result, after
    which the epilogue has only a bias; words: whether it shall leave words of bits.
    """
    _, norm, residual, activation, slope, slopes = epilogue
    statistics: Statistics = "stats" if stats else "" if norm.mean is None else "norm"
    addresses, residual_strides = x.data_ptr() | w.data_ptr(), None
    if residual is not None:
        addresses, residual_strides = addresses | residual.data_ptr(), residual.stride()
    return tuple.__new__(FpropKey, (
        x.shape, x.stride(), w.shape, w.stride(), residual_strides, x.dtype, geometry, statistics, norm.eps, activation,
        slope, slopes is not None and slopes.numel() == 1, tf32, tile, devices.gpu(w.device), addresses % 16 == 0,
        words,
    ))  # fmt: skip


def dgrad_key(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    fmt: torch.memory_format,
    geometry: Geometry,
    tf32: bool,
    tile: Tile | None,
    epilogue: GradientEpilogue = NO_EPILOGUE,
    sums: bool = False,
    second: SecondProduct | None = None,
) -> DgradKey:
    """sums: whether the kernel shall leave those of what the epilogue makes. Raises ValueError where the epilogue or
    the second product does not fit the gradient.
    """
    addresses, below, x_shape = dy.data_ptr() | w.data_ptr(), None, tuple(x_shape)
    second_strides = None
    if second is not None:
        problem = geometry.problem(x_shape, w.shape)
        check_second_product(second, x_shape, dy.dtype, problem.is_pointwise and problem.groups == 1)
        addresses |= second.x.data_ptr() | second.own.data_ptr()
        second_strides = second.x.stride()
    if sums or epilogue is not NO_EPILOGUE:
        check_gradient_epilogue(epilogue, x_shape, dy.dtype, sums)
        residual, y, z, words, norm, activation, slope = epilogue
        for t in (residual, y, z):
            addresses |= 0 if t is None else t.data_ptr()
        strides = [None if t is None else t.stride() for t in (residual, y, z)]
        below = tuple.__new__(BelowKey, (*strides, words is not None, norm.eps, activation, slope, sums))
    return tuple.__new__(DgradKey, (
        dy.shape, dy.stride(), w.shape, w.stride(), dy.dtype, x_shape, fmt, geometry, tf32, tile,
        devices.gpu(dy.device), addresses % 16 == 0, below, second_strides,
    ))  # fmt: skip


def wgrad_key(
    x: torch.Tensor,
    dy: torch.Tensor,
    w_shape: Sequence[int],
    fmt: torch.memory_format,
    geometry: Geometry,
    tf32: bool,
    tile: Tile | None,
    wide: bool = False,
) -> WgradKey:
    aligned = (x.data_ptr() | dy.data_ptr()) % 16 == 0
    return tuple.__new__(WgradKey, (
        x.shape, x.stride(), dy.shape, dy.stride(), x.dtype, tuple(w_shape), fmt, geometry, tf32, tile,
        devices.gpu(x.device), aligned, wide,
    ))  # fmt: skip
