"""Convolution: forward and gradients, by the family of kernels and the tile that choosing.py picks.

Tensors are of logical shape x [N, C, H, W], w [K, C / groups, R, S], y [N, K, P, Q], in any memory layout; `padding` is
(top, bottom, left, right). Arguments are taken to be consistent: cnnfast.functional checks what users pass. `tile`
replaces the choice for the direct kernels, and its type tells the family; im2col chooses for each piece of its
workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from . import devices, launch, memory
from .batchnorm import batch_moments, contiguous
from .choosing import Geometry, Question, Tile, ask_dgrad, ask_fprop, ask_wgrad, choose, precision_of
from .dtypes import accumulator_dtype
from .epilogue import PLAIN, BatchNorm, Epilogue
from .gather.depthwise import (
    StripLaunch,
    moments_rows,
    plan_depthwise_dgrad,
    plan_depthwise_fprop,
    plan_depthwise_wgrad,
)
from .gather.dgrad import plan_dgrad
from .gather.fprop import plan_fprop
from .gather.im2col import im2col_dgrad, im2col_fprop, im2col_wgrad
from .gather.wgrad import plan_wgrad
from .layout import Layout, dense
from .moments import TileRows, combine
from .operands import DgradOperands, FpropOperands, WgradOperands
from .slots import WgradLaunches
from .tiling import StripTile, cdiv
from .tma.dgrad import plan_tma_dgrad
from .tma.fprop import box_rows, plan_tma_fprop
from .tma.stem import PackedFpropLaunches, PackedWgradLaunches, plan_stem_fprop, plan_stem_wgrad
from .tma.tiles import BoxTile
from .tma.wgrad import plan_tma_wgrad

Algorithm = Literal["auto", "direct", "im2col"]


def _check(tile: Tile, reason: str) -> None:
    if reason and isinstance(tile, BoxTile):
        raise ValueError(
            f"tile={tile} is of the kernels that load by tensor maps, which cannot serve this call: {reason}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Plans: all that a call needs and its tensors' contents do not change


def _tile(q: Question, tile: Tile | None) -> Tile:
    """The tile that was given, or the choice."""
    if tile is None:
        return choose(q)
    _check(tile, q.why_no_boxes)
    return tile


class FpropPlan(NamedTuple):
    y: Layout
    run: launch.Launch | StripLaunch | PackedFpropLaunches
    moments: Layout  # where the kernel can leave those of its tiles, and which pixels these are
    rows: TileRows


@launch.planned
def _plan_fprop(
    x_shape,
    x_strides,
    w_shape,
    w_strides,
    residual_strides,
    dtype,
    geometry: Geometry,
    kind,
    eps,
    activation,
    slope,
    tf32,
    tile,
    gpu,
    aligned,
) -> FpropPlan:
    x, w = Layout(x_shape, x_strides, dtype), Layout(w_shape, w_strides, dtype)
    q = ask_fprop(x, w, residual_strides, geometry, kind, activation, tf32, gpu, aligned)
    g, y, residual = q.problem, q.y, q.residual
    tile = _tile(q, tile)
    if isinstance(tile, StripTile):
        run = plan_depthwise_fprop(g, tile, x, w, y, residual, eps, activation, slope)
        rows = moments_rows(g, tile)
        tiles = cdiv(rows.tiles, tile.BLOCK_M)
    elif isinstance(tile, BoxTile):
        plan = plan_stem_fprop if q.packed else plan_tma_fprop
        run = plan(g, tile, x, w, y, residual, eps, activation, slope)
        rows = box_rows(q.boxed, tile)
        tiles = rows.tiles
    else:
        run = plan_fprop(g, tile, q.precision, x, w, y, residual, eps, activation, slope)
        pixels = g.N * g.P * g.Q
        tiles = cdiv(pixels, tile.BLOCK_M)
        rows = TileRows(max(tiles, 1), pixels, tile.BLOCK_M)
    return FpropPlan(y, run, dense((tiles, 2, g.K), accumulator_dtype(dtype)), rows)


def fprop_plan(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    stats: bool = False,
    tf32: bool = False,
    tile: Tile | None = None,
) -> FpropPlan:
    _, norm, residual, activation, slope = epilogue
    addresses = x.data_ptr() | w.data_ptr() | (0 if residual is None else residual.data_ptr())
    return _plan_fprop(
        x.shape, x.stride(), w.shape, w.stride(), None if residual is None else residual.stride(), x.dtype, geometry,
        "stats" if stats else "" if norm.mean is None else "norm", norm.eps, activation, slope, tf32, tile, devices.gpu(x.device),
        addresses % 16 == 0,
    )  # fmt: skip


class DgradPlan(NamedTuple):
    dx: Layout
    run: launch.Launch | StripLaunch


@launch.planned
def _plan_dgrad(
    dy_shape, dy_strides, w_shape, w_strides, dtype, x_shape, fmt, geometry: Geometry, tf32, tile, gpu, aligned
) -> DgradPlan:
    dy, w = Layout(dy_shape, dy_strides, dtype), Layout(w_shape, w_strides, dtype)
    q = ask_dgrad(dy, w, x_shape, fmt, geometry, tf32, gpu, aligned)
    tile = _tile(q, tile)
    if isinstance(tile, StripTile):
        return DgradPlan(q.x, plan_depthwise_dgrad(q.problem, tile, dy, w, q.x))
    if isinstance(tile, BoxTile):
        return DgradPlan(q.x, plan_tma_dgrad(q.problem, tile, dy, w, q.x))
    return DgradPlan(q.x, plan_dgrad(q.problem, tile, q.precision, dy, w, q.x))


def dgrad_plan(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    geometry: Geometry,
    fmt: torch.memory_format,
    *,
    tf32: bool = False,
    tile: Tile | None = None,
) -> DgradPlan:
    return _plan_dgrad(
        dy.shape, dy.stride(), w.shape, w.stride(), dy.dtype, tuple(x_shape), fmt,
        geometry, tf32, tile, devices.gpu(dy.device), (dy.data_ptr() | w.data_ptr()) % 16 == 0,
    )  # fmt: skip


class WgradPlan(NamedTuple):
    dw: Layout
    run: WgradLaunches | PackedWgradLaunches


@launch.planned
def _plan_wgrad(
    x_shape, x_strides, dy_shape, dy_strides, dtype, w_shape, fmt, geometry: Geometry, tf32, tile, gpu, aligned
) -> WgradPlan:
    x, dy = Layout(x_shape, x_strides, dtype), Layout(dy_shape, dy_strides, dtype)
    q = ask_wgrad(x, dy, w_shape, fmt, geometry, tf32, gpu, aligned)
    tile = _tile(q, tile)
    if isinstance(tile, StripTile):
        return WgradPlan(q.w, plan_depthwise_wgrad(q.problem, tile, x, dy, q.w))
    if isinstance(tile, BoxTile):
        plan = plan_stem_wgrad if q.packed else plan_tma_wgrad
        return WgradPlan(q.w, plan(q.problem, tile, x, dy, q.w))
    return WgradPlan(q.w, plan_wgrad(q.problem, tile, q.precision, x, dy, q.w))


def wgrad_plan(
    x: torch.Tensor,
    dy: torch.Tensor,
    w_shape: Sequence[int],
    geometry: Geometry,
    fmt: torch.memory_format,
    *,
    tf32: bool = False,
    tile: Tile | None = None,
) -> WgradPlan:
    return _plan_wgrad(
        x.shape, x.stride(), dy.shape, dy.stride(), x.dtype, tuple(w_shape), fmt,
        geometry, tf32, tile, devices.gpu(x.device), (x.data_ptr() | dy.data_ptr()) % 16 == 0,
    )  # fmt: skip


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
    bias, mean, var, weight, shift = contiguous(bias, norm.mean, norm.var, norm.gamma, norm.beta)
    addresses = x.data_ptr() | w.data_ptr() | (0 if residual is None else residual.data_ptr())
    plan: FpropPlan = _plan_fprop(  # as fprop_plan has it, without calling one function more
        x.shape, x.stride(), w.shape, w.stride(), None if residual is None else residual.stride(), x.dtype, geometry,
        "" if mean is None else "norm", norm.eps, activation, slope, tf32, tile, devices.gpu(x.device), addresses % 16 == 0,
    )  # fmt: skip
    y = memory.empty(plan.y, x)
    if algorithm == "im2col":
        epilogue = Epilogue(bias, BatchNorm(mean, var, weight, shift, norm.eps), residual, activation, slope)
        im2col_fprop(geometry.problem(x.shape, w.shape), precision_of(x.dtype, tf32), x, w, y, epilogue)
    else:
        plan.run(FpropOperands(x, w, y, bias, mean, var, weight, shift, residual))
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
    """(y, mean [K], biased variance [K]): the convolution's kernel leaves the moments of its tiles, a small one
    combines them.
    """
    if algorithm == "im2col":
        y = conv_fprop(x, w, geometry, Epilogue(bias), algorithm=algorithm, tf32=tf32, tile=tile)
        return y, *batch_moments(y)
    plan = fprop_plan(x, w, geometry, stats=True, tf32=tf32, tile=tile)
    y, moments = memory.empty(plan.y, x), memory.empty(plan.moments, x)
    (bias,) = contiguous(bias)
    plan.run(FpropOperands(x, w, y, bias, moments=moments))
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
    layout, run = dgrad_plan(dy, w, x_shape, geometry, fmt, tf32=tf32, tile=tile)
    dx = memory.empty(layout, dy)
    (bias,) = contiguous(bias)
    if algorithm == "im2col":
        im2col_dgrad(geometry.problem(x_shape, w.shape), precision_of(dy.dtype, tf32), dy, w, dx, bias)
    else:
        run(DgradOperands(dy, w, dx, bias))
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
    layout, run = wgrad_plan(x, dy, w_shape, geometry, fmt, tf32=tf32, tile=tile)
    dw = memory.empty(layout, x)
    if dy.numel() == 0 or x.numel() == 0:
        return dw.zero_()
    if algorithm == "im2col":
        im2col_wgrad(geometry.problem(x.shape, w_shape), precision_of(x.dtype, tf32), x, dy, dw)
    else:
        run(WgradOperands(x, dy, dw))
    return dw
