"""Gradient of a depthwise convolution's input.

    dx[n, h, w, c] = sum over m, r, s of dy[n, p, q, k] * w[k, r, s]
    where k = c * MULTIPLIER + m, p * stride_h = h + pad_h - r * dil_h, q alike

Every pixel of dx gathers its own sum. Strips begin where h + pad_h is a multiple of the stride: which taps meet which
of their rows is then known to the compiler. Columns with the same w mod stride_w meet the same taps, as in
gather.dgrad: a program takes columns of one such class. So no work is spent on zeros.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from ... import launch
from ...dtypes import KERNEL_DTYPES, accumulator_dtype
from ...indexing import channel_offset, class_axis, divisor, pixel_offset
from ...layout import Laid, Strides, strides_nhwc
from ...problem import ConvProblem, tap_step
from ...tiling import MAX_REGISTERS, cdiv
from .filters import DepthwiseDgradOperands, StripLaunch, filters_layout
from .strips import StripBlock, StripRows, Strips, accumulate_column, in_range, locate_strips, mask_row, zeros
from .tiles import StripTile, taps_at_once

EXTENTS = ["N", "H", "W", "P", "Q", "strips_per_column", "columns"]
DIVISORS = ["strips_magic", "strips_shift", "columns_magic", "columns_shift"]
STRIDES = [f"{t}_stride_{d}" for t in ("dy", "dx") for d in "nhwc"]


class DepthwiseDgradMemory(NamedTuple):
    """How the tensors lie in memory, as far as the kernel is compiled for it: the alignment of their strides in
    elements.
    """

    dy_align: int
    w_align: int
    dx_align: int


@triton.jit(do_not_specialize=EXTENTS + DIVISORS + STRIDES)
@no_type_check
def depthwise_dgrad_kernel(
    dy_ptr, w_ptr, dx_ptr, bias_ptr, N, H, W, P, Q,
    strips_per_column, strips_magic, strips_shift, columns, columns_magic, columns_shift,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    w_stride_r, w_stride_s, w_stride_k,
    dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    g: tl.constexpr, memory: tl.constexpr, block: tl.constexpr,
    STEP_W: tl.constexpr, MISSES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_M strips of BLOCK_C channels of dx, plus the bias of a transposed convolution if there is one.

    g: ConvGeometry of groups of one channel; memory: DepthwiseDgradMemory; block: StripBlock. STEP_W: the distance
    between taps of a row that meet the same class of columns. MISSES: some pixel has taps that lie outside dy. Each
    addition is then selected, which costs a predicate.
    """
    MULTIPLIER: tl.constexpr = g.K  # filters of a channel
    C: tl.constexpr = g.groups
    R: tl.constexpr = g.R
    TAPS: tl.constexpr = block.TAPS
    ROWS: tl.constexpr = block.ROWS
    BLOCK_M: tl.constexpr = block.BLOCK_M
    BLOCK_C: tl.constexpr = block.BLOCK_C
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C

    # Channels vary fastest, then classes: programs that run together read whole pixels, and the same part of dy.
    pid = tl.program_id(0)
    first = pid // TILES_C % g.stride_w
    tile = pid // TILES_C // g.stride_w
    strips = Strips(N, strips_per_column, strips_magic, strips_shift, columns, columns_magic, columns_shift)
    n, i, j, ok = locate_strips(tile, strips, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    channels_ok = None if C % BLOCK_C == 0 else c_ok
    _, s0, taps_s, q0 = class_axis(first, W, g.S, g.stride_w, g.pad_w, g.dil_w, STEP_W)

    h = i * ROWS - g.pad_h % g.stride_h
    x_column = first + j * g.stride_w
    ok = ok & (x_column < W)
    p0 = i * (ROWS // g.stride_h) + g.pad_h // g.stride_h
    q = q0 + j
    dy_row = dy_stride_h.to(tl.int64) * memory.dy_align
    dy_column = dy_stride_w.to(tl.int64) * memory.dy_align
    dy_strides = Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, memory.dy_align)
    dy_pixels = dy_ptr + pixel_offset(n, p0, q, dy_strides)
    w_row = w_stride_r * memory.w_align
    w_column = w_stride_s * memory.w_align
    p0 = mask_row(p0, ok)

    acc = zeros(ROWS, BLOCK_M, BLOCK_C, ACC)
    for m in range(MULTIPLIER):
        k = c * MULTIPLIER + m
        dy_channels = dy_pixels[:, None] + channel_offset(k, dy_stride_c)[None, :]
        # each thread loads its own
        w_taps = w_ptr + tl.zeros((BLOCK_M,), tl.int32)[:, None] + channel_offset(k, w_stride_k)[None, :]
        for r0 in tl.static_range(0, R, TAPS):
            for t in range(taps_s):
                up = r0 * g.dil_h // g.stride_h  # a whole number
                left = t * (g.dil_w * STEP_W // g.stride_w)
                row = mask_row(p0 - up, in_range(q - left, Q))
                rows = StripRows(dy_channels - (up * dy_row + left * dy_column), row, P, dy_row)
                acc = accumulate_column(
                    acc, rows, w_taps + (r0 * w_row + (s0 + t * STEP_W) * w_column), w_row, channels_ok,
                    min(TAPS, R - r0), 1, -g.dil_h, g.stride_h, MISSES,
                )  # fmt: skip

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(ACC)
    dx_strides = Strides(dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, memory.dx_align)
    dx_pixels = dx_ptr + pixel_offset(n, h, x_column, dx_strides)[:, None] + channel_offset(c, dx_stride_c)[None, :]
    dx_row = dx_stride_h.to(tl.int64) * memory.dx_align
    for t in tl.static_range(ROWS):
        dx = acc[t]
        if bias_ptr is not None:
            dx = dx + bias[None, :]
        mask = (ok & in_range(h + t, H))[:, None] & c_ok[None, :]
        tl.store(dx_pixels + t * dx_row, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def plan_depthwise_dgrad(
    problem: ConvProblem, tile: StripTile, dy: Laid, w: Laid, dx: Laid
) -> StripLaunch[DepthwiseDgradOperands]:
    """See `depthwise_dgrad`."""
    g = problem
    if tile.ROWS % g.stride_h:
        raise ValueError(f"tile.ROWS={tile.ROWS} must be a multiple of stride_h={g.stride_h}")
    strips, columns = cdiv(g.H + g.pad_h % g.stride_h, tile.ROWS), cdiv(g.W, g.stride_w)
    grid = (cdiv(g.N * strips * columns, tile.BLOCK_M) * g.stride_w * cdiv(g.C, tile.BLOCK_C),)
    ws, copies = filters_layout(w, tile)
    dys, dxs = strides_nhwc(dy), strides_nhwc(dx)
    step_h, step_w = tap_step(g.stride_h, g.dil_h), tap_step(g.stride_w, g.dil_w)
    run = launch.Launch(
        depthwise_dgrad_kernel, grid, g.N, g.H, g.W, g.P, g.Q,
        strips, *divisor(max(strips, 1)), columns, *divisor(max(columns, 1)),
        *dys[:4], *ws[1:4], *dxs[:4],
        tile=tile, g=g.geometry(C=1, K=g.group_filters),
        memory=DepthwiseDgradMemory(dys.align, ws.align, dxs.align),
        block=StripBlock(tile.BLOCK_M, tile.BLOCK_C, tile.ROWS, taps_at_once(g.R, step_h)),
        STEP_W=step_w, MISSES=g.taps_miss_h or g.taps_miss_w, ACC=KERNEL_DTYPES[accumulator_dtype(dx.dtype)],
        num_warps=tile.num_warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return StripLaunch(run, copies)


def depthwise_dgrad(
    problem: ConvProblem,
    tile: StripTile,
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Writes every element of dx, the gradient of a depthwise convolution's input, or with `bias` the result of a
    transposed convolution.

    Shapes: dy [N, K, P, Q], w [K, 1, R, S], dx [N, C, H, W], in any memory layout; bias [C]. tile.ROWS must be a
    multiple of the stride.
    """
    plan_depthwise_dgrad(problem, tile, dy, w, dx)(DepthwiseDgradOperands(dy, w, dx, bias))
