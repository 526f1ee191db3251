"""Convolution: the one place that picks a family of kernels and a tile.

Tensors are of logical shape x [N, C, H, W], w [K, C / groups, R, S], y [N, K, P, Q], in any memory layout; `padding` is
(top, bottom, left, right). Arguments are taken to be consistent: cnnfast.functional checks what users pass. `tile`
replaces the choice for the direct kernels, and its type tells the family; im2col chooses for each piece of its workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from . import launch
from .batchnorm import batch_moments, contiguous
from .epilogue import PLAIN, BatchNorm, Epilogue
from .gather.depthwise import StripPlan, moments_rows, plan_depthwise_dgrad, plan_depthwise_fprop, plan_depthwise_wgrad, vector_length
from .gather.dgrad import plan_dgrad
from .gather.fprop import plan_fprop
from .gather.im2col import im2col_dgrad, im2col_fprop, im2col_wgrad
from .gather.slots import WgradPlan
from .gather.wgrad import plan_wgrad
from .partials import TileRows, combine
from .problem import ConvProblem
from .tiling import Operation, Precision, StripTile, TileConfig, cdiv, choose_strip_tile, choose_tile, precision_class

Algorithm = Literal["auto", "direct", "im2col"]
Tile = TileConfig | StripTile  # of the general kernels, and of those of depthwise convolution


class Geometry(NamedTuple):
    """How the filters move over the image."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def problem(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> ConvProblem:
        return ConvProblem.of(tuple(x_shape), tuple(w_shape), *self)


def _precision(dtype: torch.dtype, tf32: bool) -> Precision:
    return precision_class(str(dtype).removeprefix("torch."), tf32)


def _tile(
    operation: Operation, problem: ConvProblem, precision: Precision, arch: int, x: launch.Layout, w: launch.Layout, y: launch.Layout
) -> Tile:
    """`x`, `w` and `y` may each be the operand or its gradient."""
    if problem.is_depthwise:
        return choose_strip_tile(problem, operation, precision, vector_length(x, y))
    operands = {"fprop": (x, w), "dgrad": (y, w), "wgrad": (x, y)}[operation]
    adjacent = all(t.stride(1) == 1 or t.shape[1] == 1 for t in operands)
    return choose_tile(problem, operation, precision, adjacent, arch)


# ----------------------------------------------------------------------------------------------------------------------
# Plans: all that a call needs and its tensors' contents do not change


class FpropPlan(NamedTuple):
    y: launch.Layout
    run: launch.Plan | StripPlan
    moments: launch.Layout  # where the kernel can leave those of its tiles, and which pixels these are
    rows: TileRows


@launch.planned
def _plan_fprop(
    x_shape, x_strides, w_shape, w_strides, residual_strides, dtype, geometry: Geometry, eps, activation, slope, tf32, tile, arch
) -> FpropPlan:
    g = geometry.problem(x_shape, w_shape)
    x, w = launch.Layout(x_shape, x_strides, dtype), launch.Layout(w_shape, w_strides, dtype)
    y = launch.dense((g.N, g.K, g.P, g.Q), dtype, launch.memory_format(x, w))
    residual = None if residual_strides is None else launch.Layout(y.shape, residual_strides, dtype)
    precision = _precision(dtype, tf32)
    tile = tile or _tile("fprop", g, precision, arch, x, w, y)
    if isinstance(tile, StripTile):
        run = plan_depthwise_fprop(g, tile, x, w, y, residual, eps, activation, slope)
        rows = moments_rows(g, tile)
        tiles = cdiv(rows.tiles, tile.BLOCK_M)
    else:
        run = plan_fprop(g, tile, precision, x, w, y, residual, eps, activation, slope)
        pixels = g.N * g.P * g.Q
        tiles = cdiv(pixels, tile.BLOCK_M)
        rows = TileRows(max(tiles, 1), pixels, tile.BLOCK_M)
    return FpropPlan(y, run, launch.dense((tiles, 2, g.K), launch.accumulator_dtype(dtype)), rows)


@launch.planned
def _plan_dgrad(
    dy_shape, dy_strides, w_shape, w_strides, dtype, x_shape, fmt, geometry: Geometry, tf32, tile, arch
) -> tuple[launch.Layout, launch.Plan | StripPlan]:
    g = geometry.problem(x_shape, w_shape)
    dy, w = launch.Layout(dy_shape, dy_strides, dtype), launch.Layout(w_shape, w_strides, dtype)
    dx = launch.dense(x_shape, dtype, fmt)
    precision = _precision(dtype, tf32)
    tile = tile or _tile("dgrad", g, precision, arch, dx, w, dy)
    if isinstance(tile, StripTile):
        return dx, plan_depthwise_dgrad(g, tile, dy, w, dx)
    return dx, plan_dgrad(g, tile, precision, dy, w, dx)


@launch.planned
def _plan_wgrad(
    x_shape, x_strides, dy_shape, dy_strides, dtype, w_shape, fmt, geometry: Geometry, tf32, tile, arch
) -> tuple[launch.Layout, WgradPlan]:
    g = geometry.problem(x_shape, w_shape)
    x, dy = launch.Layout(x_shape, x_strides, dtype), launch.Layout(dy_shape, dy_strides, dtype)
    dw = launch.dense(w_shape, dtype, fmt)
    precision = _precision(dtype, tf32)
    tile = tile or _tile("wgrad", g, precision, arch, x, dw, dy)
    if isinstance(tile, StripTile):
        return dw, plan_depthwise_wgrad(g, tile, x, dy, dw)
    return dw, plan_wgrad(g, tile, precision, x, dy, dw)


# ----------------------------------------------------------------------------------------------------------------------


def conv_fprop(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """What `epilogue` makes of conv(x, w), in one kernel (im2col: one for each piece of the workspace, and its copies)."""
    bias, norm, residual, activation, slope = epilogue
    bias, mean, var, weight, shift = contiguous(bias, *norm[:4])
    plan: FpropPlan = _plan_fprop(
        x.shape, x.stride(), w.shape, w.stride(), None if residual is None else residual.stride(), x.dtype,
        geometry, norm.eps, activation, slope, tf32, tile, launch.architecture(x.device),
    )  # fmt: skip
    y = launch.empty(plan.y, x)
    if algorithm == "im2col":
        epilogue = Epilogue(bias, BatchNorm(mean, var, weight, shift, norm.eps), residual, activation, slope)
        im2col_fprop(geometry.problem(x.shape, w.shape), _precision(x.dtype, tf32), x, w, y, epilogue)
    else:
        plan.run(x, w, y, bias, mean, var, weight, shift, residual, None)
    return y


def conv_stats(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    *,
    bias: torch.Tensor | None = None,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean [K], biased variance [K]): the convolution's kernel leaves the moments of its tiles, a small one combines them."""
    if algorithm == "im2col":
        y = conv_fprop(x, w, geometry, Epilogue(bias), algorithm=algorithm, tf32=tf32, tile=tile)
        return y, *batch_moments(y)
    plan: FpropPlan = _plan_fprop(
        x.shape, x.stride(), w.shape, w.stride(), None, x.dtype,
        geometry, 0.0, None, 0.0, tf32, tile, launch.architecture(x.device),
    )  # fmt: skip
    y, moments = launch.empty(plan.y, x), launch.empty(plan.moments, x)
    (bias,) = contiguous(bias)
    plan.run(x, w, y, bias, None, None, None, None, None, moments)
    mean, var = combine(moments, plan.rows)
    assert var is not None
    return y, mean, var


def conv_dgrad(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    geometry: Geometry,
    *,
    bias: torch.Tensor | None = None,
    fmt: torch.memory_format = torch.contiguous_format,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Gradient of sum(dy * conv(x, w)) with respect to x, plus `bias` [C]: the transposed convolution of dy."""
    layout, run = _plan_dgrad(
        dy.shape, dy.stride(), w.shape, w.stride(), dy.dtype, tuple(x_shape), fmt, geometry, tf32, tile, launch.architecture(dy.device)
    )
    dx = launch.empty(layout, dy)
    (bias,) = contiguous(bias)
    if algorithm == "im2col":
        im2col_dgrad(geometry.problem(x_shape, w.shape), _precision(dy.dtype, tf32), dy, w, dx, bias)
    else:
        run(dy, w, dx, bias)
    return dx


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    w_shape: Sequence[int],
    geometry: Geometry,
    *,
    fmt: torch.memory_format = torch.contiguous_format,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Gradient of sum(dy * conv(x, w)) with respect to w."""
    layout, run = _plan_wgrad(
        x.shape, x.stride(), dy.shape, dy.stride(), x.dtype, tuple(w_shape), fmt, geometry, tf32, tile, launch.architecture(x.device)
    )
    dw = launch.empty(layout, x)
    if dy.numel() == 0 or x.numel() == 0:
        return dw.zero_()
    if algorithm == "im2col":
        im2col_wgrad(geometry.problem(x.shape, w_shape), _precision(x.dtype, tf32), x, dy, dw)
    else:
        run(x, dy, dw)
    return dw
