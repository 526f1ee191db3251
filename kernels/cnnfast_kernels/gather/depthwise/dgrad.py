"""Gradient of a depthwise convolution's input.

    dx[n, h, w, c] = sum over m, r, s of dy[n, p, q, k] * w[k, r, s]
    where k = c * MULTIPLIER + m, p * stride_h = h + pad_h - r * dil_h, q alike

Every pixel of dx gathers its own sum. Strips begin where h + pad_h is a multiple of the stride: which taps meet which
of their rows is then known to the compiler. Columns with the same w mod stride_w meet the same taps, as in
gather.dgrad: a program takes columns of one such class. So no work is spent on zeros.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ... import launch
from ...dtypes import KERNEL_DTYPES, accumulator_dtype
from ...indexing import channel_offset, class_axis, divisor, pixel_offset
from ...layout import Laid, Strides, strides_nhwc
from ...operands import DgradOperands
from ...problem import ConvProblem, tap_step
from ...tiling import MAX_REGISTERS, cdiv
from .strips import FAR, StripPlan, accumulate_column, filters_layout, in_range, locate_strips, zeros
from .tiles import StripTile, taps_at_once

EXTENTS = [
    "N",
    "H",
    "W",
    "P",
    "Q",
    "strips",
    "strips_magic",
    "strips_shift",
    "columns",
    "columns_magic",
    "columns_shift",
]
STRIDES = [f"{t}_stride_{d}" for t in ("dy", "dx") for d in "nhwc"]


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
@no_type_check
def depthwise_dgrad_kernel(
    dy_ptr, w_ptr, dx_ptr, bias_ptr, N, H, W, P, Q, strips, strips_magic, strips_shift, columns, columns_magic, columns_shift,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    w_stride_r, w_stride_s, w_stride_k,
    dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    C: tl.constexpr, MULTIPLIER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STEP_W: tl.constexpr, MISSES: tl.constexpr, DY_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    TAPS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_M strips of BLOCK_C channels of dx, plus the bias of a transposed convolution if there is one.

    MISSES: some pixel has taps that lie outside dy. Each addition is then selected, which costs a predicate.
    """
    EVEN: tl.constexpr = C % BLOCK_C == 0
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C

    # Channels vary fastest, then classes: programs that run together read whole pixels, and the same part of dy.
    pid = tl.program_id(0)
    first = pid // TILES_C % STRIDE_W
    tile = pid // TILES_C // STRIDE_W
    n, i, j, ok = locate_strips(
        tile, N, strips, columns, strips_magic, strips_shift, columns_magic, columns_shift, BLOCK_M
    )
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    _, s0, taps_s, q0 = class_axis(first, W, S, STRIDE_W, PAD_W, DIL_W, STEP_W)

    h = i * ROWS - PAD_H % STRIDE_H
    x_column = first + j * STRIDE_W
    ok = ok & (x_column < W)
    p0 = i * (ROWS // STRIDE_H) + PAD_H // STRIDE_H
    q = q0 + j
    dy_row = dy_stride_h.to(tl.int64) * DY_ALIGN
    dy_column = dy_stride_w.to(tl.int64) * DY_ALIGN
    dy_pixels = dy_ptr + pixel_offset(n, p0, q, Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, DY_ALIGN))
    w_row = w_stride_r * W_ALIGN
    w_column = w_stride_s * W_ALIGN
    first_row = tl.where(ok, p0, FAR)

    acc = zeros(ROWS, BLOCK_M, BLOCK_C, ACC)
    for m in range(MULTIPLIER):
        k = c * MULTIPLIER + m
        dy_rows = dy_pixels[:, None] + channel_offset(k, dy_stride_c)[None, :]
        # each thread loads its own
        w_taps = w_ptr + tl.zeros((BLOCK_M,), tl.int32)[:, None] + channel_offset(k, w_stride_k)[None, :]
        for r0 in tl.static_range(0, R, TAPS):
            for t in range(taps_s):
                up = r0 * DIL_H // STRIDE_H  # a whole number
                left = t * (DIL_W * STEP_W // STRIDE_W)
                row = tl.where(in_range(q - left, Q), first_row - up, FAR)
                acc = accumulate_column(
                    acc, dy_rows - (up * dy_row + left * dy_column), row, P, dy_row,
                    w_taps + (r0 * w_row + (s0 + t * STEP_W) * w_column), w_row, c_ok,
                    ROWS, min(TAPS, R - r0), 1, -DIL_H, STRIDE_H, EVEN, ACC, MISSES,
                )  # fmt: skip

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(ACC)
    dx_rows = (
        dx_ptr
        + pixel_offset(n, h, x_column, Strides(dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, DX_ALIGN))[:, None]
    )
    dx_rows = dx_rows + channel_offset(c, dx_stride_c)[None, :]
    for t in tl.static_range(ROWS):
        dx = acc[t]
        if bias_ptr is not None:
            dx = dx + bias[None, :]
        mask = (ok & in_range(h + t, H))[:, None] & c_ok[None, :]
        tl.store(dx_rows + t * dx_stride_h.to(tl.int64) * DX_ALIGN, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def plan_depthwise_dgrad(problem: ConvProblem, tile: StripTile, dy: Laid, w: Laid, dx: Laid) -> StripPlan:
    """Takes (dy, w, dx, bias); see `depthwise_dgrad`."""
    g = problem
    if tile.ROWS % g.stride_h:
        raise ValueError(f"tile.ROWS={tile.ROWS} must be a multiple of stride_h={g.stride_h}")
    strips, columns = cdiv(g.H + g.pad_h % g.stride_h, tile.ROWS), cdiv(g.W, g.stride_w)
    grid = (cdiv(g.N * strips * columns, tile.BLOCK_M) * g.stride_w * cdiv(g.C, tile.BLOCK_C),)
    ws, copies = filters_layout(w, tile)
    dys, dxs = strides_nhwc(dy), strides_nhwc(dx)
    run = launch.Launch(
        depthwise_dgrad_kernel, grid, g.N, g.H, g.W, g.P, g.Q,
        strips, *divisor(max(strips, 1)), columns, *divisor(max(columns, 1)), *dys[:4], *ws[1:4], *dxs[:4],
        tile=tile, C=g.C, MULTIPLIER=g.group_filters, R=g.R, S=g.S,
        STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w, DIL_H=g.dil_h, DIL_W=g.dil_w,
        STEP_W=tap_step(g.stride_w, g.dil_w), MISSES=g.taps_miss_h or g.taps_miss_w,
        DY_ALIGN=dys.align, W_ALIGN=ws.align, DX_ALIGN=dxs.align,
        TAPS=taps_at_once(g.R, tap_step(g.stride_h, g.dil_h)),
        ACC=KERNEL_DTYPES[accumulator_dtype(dx.dtype)],
        ROWS=tile.ROWS, BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return StripPlan(run, copies)


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
    plan_depthwise_dgrad(problem, tile, dy, w, dx)(DgradOperands(dy, w, dx, bias))
