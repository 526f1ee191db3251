"""Global average pooling: the one pooling that reduces across threads.

A program sums blocks of BLOCK_PIXELS x BLOCK_C of one image, element by element, and adds the block's pixels up at its
end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..indexing import channel_offset
from ..layout import Laid, Layout, Strides, dense, result_format, strides_nhwc
from ..rounding import round_quotient
from ..tiling import BUSY_PROGRAMS, MAX_REGISTERS, cdiv
from .rows import NUM_WARPS, RUNTIME, PoolAlignments, step_offset


class PlaneMeanOperands(NamedTuple):
    """x [N, C, H, W] and the result y [N, C, splits, 1]."""

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True, slots=True)
class MeanTile:
    """The block of pixels x channels of one step. CHANNELS_FAST: neighbouring threads take neighbouring channels, else
    neighbouring pixels.
    """

    BLOCK_PIXELS: int
    BLOCK_C: int
    CHANNELS_FAST: bool

    def __str__(self) -> str:
        return f"{self.BLOCK_PIXELS}x{self.BLOCK_C} {'NHWC' if self.CHANNELS_FAST else 'NCHW'}"


@triton.jit(do_not_specialize=["count", "span", "splits", *RUNTIME])
@no_type_check
def plane_mean_kernel(
    x_ptr, y_ptr, count, span, splits, H, W,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    y_stride_n, y_stride_h, y_stride_c,
    C: tl.constexpr, align: tl.constexpr, ACC: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """y[n, split, c] = sum of x over `span` pixels of plane (n, c), divided by `count`."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    split = pid // tiles_c % splits
    n = pid // tiles_c // splits
    channels = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_PIXELS)
    PIXEL_AXIS: tl.constexpr = 0 if CHANNELS_FAST else 1
    if CHANNELS_FAST:  # neighbouring threads run along a block's last axis
        c = channels[None, :]
        lane = lane[:, None]
        acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), ACC)
    else:
        c = channels[:, None]
        lane = lane[None, :]
        acc = tl.zeros((BLOCK_C, BLOCK_PIXELS), ACC)

    first = split * span
    pixels = tl.minimum(span, H * W - first)
    x_strides = Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, align.x)
    x_cols = x_ptr + n.to(tl.int64) * x_stride_n * align.x + channel_offset(c, x_stride_c)
    for step in range(tl.cdiv(pixels, BLOCK_PIXELS)):
        pixel = first + step * BLOCK_PIXELS + lane
        mask = (lane < pixels - step * BLOCK_PIXELS) & (c < C)
        acc += tl.load(x_cols + step_offset(pixel // W, pixel % W, x_strides), mask=mask, other=0.0).to(ACC)

    y = round_quotient(tl.sum(acc, PIXEL_AXIS), count.to(ACC))
    y_row = (n.to(tl.int64) * y_stride_n + split.to(tl.int64) * y_stride_h) * align.y
    tl.store(y_ptr + y_row + channel_offset(channels, y_stride_c), y.to(y_ptr.dtype.element_ty), mask=channels < C)


def _plan_plane(x: Laid, y: Laid, count: int, span: int, tile: MeanTile) -> launch.Launch[PlaneMeanOperands]:
    """y [N, C, splits, 1] = sums over `span` pixels each, divided by `count`."""
    N, C, H, W = x.shape
    splits = y.shape[2]
    xs, ys = strides_nhwc(x), strides_nhwc(y)
    return launch.Launch(
        plane_mean_kernel, (N * splits * cdiv(C, tile.BLOCK_C),), count, span, splits, H, W, *xs[:4], ys.n, ys.h, ys.c,
        tile=tile, C=C, align=PoolAlignments(x=xs.align, y=ys.align), ACC=KERNEL_DTYPES[accumulator_dtype(x.dtype)],
        BLOCK_PIXELS=tile.BLOCK_PIXELS, BLOCK_C=tile.BLOCK_C, CHANNELS_FAST=tile.CHANNELS_FAST,
        num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def _plane_tile(C: int, channels_fast: bool) -> MeanTile:
    block_c = min(128 if channels_fast else 16, triton.next_power_of_2(max(C, 1)))
    return MeanTile((2048 if channels_fast else 1024) // block_c, block_c, channels_fast)


class MeanPlan(NamedTuple):
    """The mean y at once, or, where planes are cut, sums of `parts` and a second launch for the mean of those."""

    y: Layout
    first: launch.Launch[PlaneMeanOperands]
    parts: Layout | None = None
    second: launch.Launch[PlaneMeanOperands] | None = None


@launch.planned
def _plan(shape: tuple[int, int, int, int], strides: tuple[int, ...], dtype: torch.dtype) -> MeanPlan:
    N, C, H, W = shape
    x = Layout(shape, strides, dtype)
    fmt = result_format(x)
    y = dense((N, C, 1, 1), dtype, fmt)
    tile = _plane_tile(C, fmt == torch.channels_last)
    programs = max(1, N * cdiv(C, tile.BLOCK_C))
    splits = max(1, min(cdiv(2 * BUSY_PROGRAMS, programs), H * W // (8 * tile.BLOCK_PIXELS)))
    if splits == 1:
        return MeanPlan(y, _plan_plane(x, y, H * W, H * W, tile))
    span = cdiv(cdiv(H * W, splits), tile.BLOCK_PIXELS) * tile.BLOCK_PIXELS
    parts = dense((N, C, cdiv(H * W, span), 1), accumulator_dtype(dtype), torch.channels_last)
    second = _plan_plane(parts, y, H * W, parts.shape[2], _plane_tile(C, True))
    return MeanPlan(y, _plan_plane(x, parts, 1, span, tile), parts, second)


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """The mean of each plane of x [N, C, H, W]: [N, C, 1, 1], channels_last if x is.

    Few large planes are cut into parts, whose sums a second launch adds in order.
    """
    layout, first, parts_layout, second = _plan(x.shape, x.stride(), x.dtype)
    y = memory.empty(layout, x)
    if parts_layout is None:
        first(PlaneMeanOperands(x, y))
    else:
        parts = memory.empty(parts_layout, x)
        first(PlaneMeanOperands(x, parts))
        second(PlaneMeanOperands(parts, y))
    return y
