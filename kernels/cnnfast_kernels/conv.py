"""Convolution: the one place that picks a family of kernels and a tile, by a measured row (tables.py) or by default.

Tensors are of logical shape x [N, C, H, W], w [K, C / groups, R, S], y [N, K, P, Q], in any memory layout; `padding` is
(top, bottom, left, right). Arguments are taken to be consistent: cnnfast.functional checks what users pass. `tile`
replaces the choice for the direct kernels, and its type tells the family; im2col chooses for each piece of its workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from . import launch, tables
from .batchnorm import batch_moments
from .epilogue import PLAIN, Epilogue
from .gather.depthwise import StripPlan, moments_rows, plan_depthwise_dgrad, plan_depthwise_fprop, plan_depthwise_wgrad, vector_length
from .gather.dgrad import plan_dgrad
from .gather.fprop import plan_fprop
from .gather.im2col import im2col_dgrad, im2col_fprop, im2col_wgrad
from .gather.slots import WgradPlan
from .gather.wgrad import plan_wgrad
from .partials import TileRows, combine
from .problem import ConvProblem
from .tiling import (
    Operation,
    Precision,
    StripTile,
    TileConfig,
    cdiv,
    choose_strip_tile,
    choose_tile,
    precision_class,
    search_strip_tiles,
    search_tiles,
)

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


class Question(NamedTuple):
    """What the choice of a family and a tile follows from. `x`, `w` and `y` may each be the operand or its gradient."""

    operation: Operation
    problem: ConvProblem
    tf32: bool
    gpu: launch.Gpu
    x: launch.Layout
    w: launch.Layout
    y: launch.Layout
    epilogue: str = ""  # as tables.Key names it

    @property
    def precision(self) -> Precision:
        return _precision(self.x.dtype, self.tf32)

    @property
    def key(self) -> tables.Key:
        dtype = "tf32" if self.tf32 else str(self.x.dtype).removeprefix("torch.")
        layout = " ".join("NHWC" if _adjacent(t) else "NCHW" for t in (self.x, self.w, self.y))
        return tables.Key(*self.gpu, self.operation, self.epilogue, dtype, layout, self.problem)

    @property
    def adjacent(self) -> bool:
        """Whether channels are, in all that is read."""
        return all(map(_adjacent, {"fprop": (self.x, self.w), "dgrad": (self.y, self.w), "wgrad": (self.x, self.y)}[self.operation]))


def _adjacent(t: launch.Layout) -> bool:
    return t.stride(1) == 1 or t.shape[1] == 1


def default_tile(q: Question) -> Tile:
    """What runs where nothing was measured."""
    if q.problem.is_depthwise:
        return choose_strip_tile(q.problem, q.operation, q.precision, vector_length(q.x, q.y))
    return choose_tile(q.problem, q.operation, q.precision, q.adjacent, q.gpu.arch)


def candidates(q: Question) -> list[Tile]:
    """What measuring tries, of every family that can serve; the default first."""
    if q.problem.is_depthwise:
        found: list[Tile] = [*search_strip_tiles(q.problem, q.operation, q.precision, vector_length(q.x, q.y))]
    else:
        found = [*search_tiles(q.problem, q.operation, q.precision, q.adjacent, q.gpu.arch)]
    return list(dict.fromkeys([default_tile(q), *found]))


def _choose(q: Question, tile: Tile | None) -> tuple[Tile, tables.Row | None]:
    """The tile to run, and the row that was found, if no tile was given."""
    row = None if tile else tables.find(q.key)
    if row is not None and isinstance(row.tile, StripTile) == q.problem.is_depthwise:
        return row.tile, row
    return tile or default_tile(q), row


# ----------------------------------------------------------------------------------------------------------------------
# Plans: all that a call needs and its tensors' contents do not change


def ask_fprop(
    x: launch.Laid, w: launch.Laid, geometry: Geometry, kind: str, residual: bool, activation: str | None, tf32: bool, gpu: launch.Gpu
) -> Question:
    """kind: "stats" if the kernel leaves those, "norm" if it normalises, else ""."""
    g = geometry.problem(x.shape, w.shape)
    y = launch.dense((g.N, g.K, g.P, g.Q), x.dtype, launch.memory_format(x, w))
    epilogue = " ".join(filter(None, (kind, "residual" * residual, activation)))
    return Question("fprop", g, tf32, gpu, launch.layout(x), launch.layout(w), y, epilogue)


def ask_dgrad(
    dy: launch.Laid, w: launch.Laid, x_shape: Sequence[int], fmt: torch.memory_format, geometry: Geometry, tf32: bool, gpu: launch.Gpu
) -> Question:
    dx = launch.dense(x_shape, dy.dtype, fmt)
    return Question("dgrad", geometry.problem(x_shape, w.shape), tf32, gpu, dx, launch.layout(w), launch.layout(dy))


def ask_wgrad(
    x: launch.Laid, dy: launch.Laid, w_shape: Sequence[int], fmt: torch.memory_format, geometry: Geometry, tf32: bool, gpu: launch.Gpu
) -> Question:
    dw = launch.dense(w_shape, x.dtype, fmt)
    return Question("wgrad", geometry.problem(x.shape, w_shape), tf32, gpu, launch.layout(x), dw, launch.layout(dy))


class FpropPlan(NamedTuple):
    y: launch.Layout
    run: launch.Plan | StripPlan
    moments: launch.Layout  # where the kernel can leave those of its tiles, and which pixels these are
    rows: TileRows
    row: tables.Row | None


@launch.planned
def _plan_fprop(
    x_shape, x_strides, w_shape, w_strides, residual_strides, dtype, geometry: Geometry, kind, eps, activation, slope, tf32, tile, gpu
) -> FpropPlan:
    x, w = launch.Layout(x_shape, x_strides, dtype), launch.Layout(w_shape, w_strides, dtype)
    q = ask_fprop(x, w, geometry, kind, residual_strides is not None, activation, tf32, gpu)
    g, y, precision = q.problem, q.y, q.precision
    residual = None if residual_strides is None else launch.Layout(y.shape, residual_strides, dtype)
    tile, row = _choose(q, tile)
    if isinstance(tile, StripTile):
        run = plan_depthwise_fprop(g, tile, x, w, y, residual, eps, activation, slope)
        rows = moments_rows(g, tile)
        tiles = cdiv(rows.tiles, tile.BLOCK_M)
    else:
        run = plan_fprop(g, tile, precision, x, w, y, residual, eps, activation, slope)
        pixels = g.N * g.P * g.Q
        tiles = cdiv(pixels, tile.BLOCK_M)
        rows = TileRows(max(tiles, 1), pixels, tile.BLOCK_M)
    return FpropPlan(y, run, launch.dense((tiles, 2, g.K), launch.accumulator_dtype(dtype)), rows, row)


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
    return _plan_fprop(
        x.shape, x.stride(), w.shape, w.stride(), None if residual is None else residual.stride(), x.dtype, geometry,
        "stats" if stats else "" if norm.mean is None else "norm", norm.eps, activation, slope, tf32, tile, launch.gpu(x.device),
    )  # fmt: skip


class DgradPlan(NamedTuple):
    dx: launch.Layout
    run: launch.Plan | StripPlan
    row: tables.Row | None


@launch.planned
def _plan_dgrad(dy_shape, dy_strides, w_shape, w_strides, dtype, x_shape, fmt, geometry: Geometry, tf32, tile, gpu) -> DgradPlan:
    dy, w = launch.Layout(dy_shape, dy_strides, dtype), launch.Layout(w_shape, w_strides, dtype)
    q = ask_dgrad(dy, w, x_shape, fmt, geometry, tf32, gpu)
    tile, row = _choose(q, tile)
    if isinstance(tile, StripTile):
        return DgradPlan(q.x, plan_depthwise_dgrad(q.problem, tile, dy, w, q.x), row)
    return DgradPlan(q.x, plan_dgrad(q.problem, tile, q.precision, dy, w, q.x), row)


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
    gpu = launch.gpu(dy.device)
    return _plan_dgrad(dy.shape, dy.stride(), w.shape, w.stride(), dy.dtype, tuple(x_shape), fmt, geometry, tf32, tile, gpu)


class WeightsPlan(NamedTuple):
    dw: launch.Layout
    run: WgradPlan
    row: tables.Row | None


@launch.planned
def _plan_wgrad(x_shape, x_strides, dy_shape, dy_strides, dtype, w_shape, fmt, geometry: Geometry, tf32, tile, gpu) -> WeightsPlan:
    x, dy = launch.Layout(x_shape, x_strides, dtype), launch.Layout(dy_shape, dy_strides, dtype)
    q = ask_wgrad(x, dy, w_shape, fmt, geometry, tf32, gpu)
    tile, row = _choose(q, tile)
    if isinstance(tile, StripTile):
        return WeightsPlan(q.w, plan_depthwise_wgrad(q.problem, tile, x, dy, q.w), row)
    return WeightsPlan(q.w, plan_wgrad(q.problem, tile, q.precision, x, dy, q.w), row)


def wgrad_plan(
    x: torch.Tensor,
    dy: torch.Tensor,
    w_shape: Sequence[int],
    geometry: Geometry,
    fmt: torch.memory_format,
    *,
    tf32: bool = False,
    tile: Tile | None = None,
) -> WeightsPlan:
    gpu = launch.gpu(x.device)
    return _plan_wgrad(x.shape, x.stride(), dy.shape, dy.stride(), x.dtype, tuple(w_shape), fmt, geometry, tf32, tile, gpu)


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
    plan = fprop_plan(x, w, geometry, epilogue, tf32=tf32, tile=tile)
    y = launch.empty(plan.y, x)
    if algorithm == "im2col":
        im2col_fprop(geometry.problem(x.shape, w.shape), _precision(x.dtype, tf32), x, w, y, epilogue)
    else:
        bias, norm, residual, _, _ = epilogue
        plan.run(x, w, y, bias, norm.mean, norm.var, norm.weight, norm.bias, residual, None)
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
    plan = fprop_plan(x, w, geometry, stats=True, tf32=tf32, tile=tile)
    y, moments = launch.empty(plan.y, x), launch.empty(plan.moments, x)
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
    layout, run, _ = dgrad_plan(dy, w, x_shape, geometry, fmt, tf32=tf32, tile=tile)
    dx = launch.empty(layout, dy)
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
    layout, run, _ = wgrad_plan(x, dy, w_shape, geometry, fmt, tf32=tf32, tile=tile)
    dw = launch.empty(layout, x)
    if dy.numel() == 0 or x.numel() == 0:
        return dw.zero_()
    if algorithm == "im2col":
        im2col_wgrad(geometry.problem(x.shape, w_shape), _precision(x.dtype, tf32), x, dy, dw)
    else:
        run(x, dy, dw)
    return dw
