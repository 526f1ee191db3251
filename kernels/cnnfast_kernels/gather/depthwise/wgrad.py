"""Gradient of a depthwise convolution's weights.

    dw[k, r, s] = sum over n, p, q of dy[n, p, q, k] * x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c]
    where c = k // MULTIPLIER

A thread sums over its own pixels, for all taps of a small filter at once, or for one column of a larger one after
another: the pixels then stay in the first-level cache. A program adds its threads' sums. The strips of dy are cut into
parts that run side by side; each writes a partial gradient to its own slot, and a second kernel adds the slots in a
fixed order: the same bits every time.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ... import launch
from ...dtypes import KERNEL_DTYPES, accumulator_dtype
from ...indexing import channel_offset, divisor, pixel_offset
from ...layout import Laid, Strides, dense, strides_nhwc
from ...operands import WgradOperands
from ...problem import ConvProblem
from ...slots import WgradLaunches, plan_reduction
from ...tiling import MAX_REGISTERS, cdiv
from .strips import FAR, add_product, filters_as_channels, in_range, load_row, locate_strips, zeros
from .tiles import StripTile, columns_at_once, taps_at_once

EXTENTS = [
    "N",
    "H",
    "W",
    "P",
    "Q",
    "SLOTS",
    "dw_stride_slot",
    "strips",
    "strips_magic",
    "strips_shift",
    "q_magic",
    "q_shift",
]
STRIDES = [f"{t}_stride_{d}" for t in ("x", "dy") for d in "nhwc"]


@triton.jit
@no_type_check
def sum_taps(
    x_cols, dy_cols, dw_cols, first, last, r0, s0, N, H, W, P, Q, strips, strips_magic, strips_shift, q_magic, q_shift,
    x_stride_n, x_stride_h, x_stride_w, dy_stride_n, dy_stride_h, dy_stride_w, dw_row, dw_column, k_ok,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_ALIGN: tl.constexpr, DY_ALIGN: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of TAPS x COLUMNS weights from (r0, s0) on, summed over tiles `first` to `last` of strips."""
    x_row = x_stride_h.to(tl.int64) * X_ALIGN
    x_column = x_stride_w.to(tl.int64) * X_ALIGN
    dy_row = dy_stride_h.to(tl.int64) * DY_ALIGN
    acc = zeros(TAPS * COLUMNS, BLOCK_M, BLOCK_C, ACC)
    for tile in range(first, last):
        n, i, q, ok = locate_strips(tile, N, strips, Q, strips_magic, strips_shift, q_magic, q_shift, BLOCK_M)
        p = i * ROWS
        h0 = p * STRIDE_H - PAD_H + r0 * DIL_H
        w0 = q * STRIDE_W - PAD_W + s0 * DIL_W
        dy_rows = (
            dy_cols + pixel_offset(n, p, q, Strides(dy_stride_n, dy_stride_h, dy_stride_w, None, DY_ALIGN))[:, None]
        )
        x_rows = x_cols + pixel_offset(n, h0, w0, Strides(x_stride_n, x_stride_h, x_stride_w, None, X_ALIGN))[:, None]
        p = tl.where(ok, p, FAR)
        dy = ()
        for t in tl.static_range(ROWS):
            dy = dy + (load_row(dy_rows + t * dy_row, p + t, P, k_ok, EVEN, ACC),)
        for s in tl.static_range(COLUMNS):
            row = tl.where(ok & in_range(w0 + s * DIL_W, W), h0, FAR)
            for j in tl.static_range((ROWS - 1) * STRIDE_H + (TAPS - 1) * DIL_H + 1):  # as in accumulate_column
                x = load_row(x_rows + (j * x_row + s * DIL_W * x_column), row + j, H, k_ok, EVEN, ACC)
                for t in tl.static_range(ROWS):
                    for r in tl.static_range(TAPS):
                        if t * STRIDE_H + r * DIL_H == j:
                            # where dy has no such row, 0 * x would be NaN for an infinite x
                            factor = tl.where((p + t < P)[:, None], x, 0.0) if RAGGED else x
                            acc = add_product(acc, r * COLUMNS + s, factor, dy[t], None)
    dw = dw_cols + r0 * dw_row + s0 * dw_column
    for tap in tl.static_range(TAPS * COLUMNS):
        total = tl.sum(acc[tap], 0)
        tl.store(dw + (tap // COLUMNS * dw_row + tap % COLUMNS * dw_column), total.to(dw.dtype.element_ty), mask=k_ok)


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
@no_type_check
def depthwise_wgrad_kernel(
    x_ptr, dy_ptr, dw_ptr, N, H, W, P, Q, SLOTS, strips, strips_magic, strips_shift, q_magic, q_shift,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    dw_stride_slot, dw_stride_r, dw_stride_s, dw_stride_k,
    K: tl.constexpr, MULTIPLIER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_ALIGN: tl.constexpr, DY_ALIGN: tl.constexpr, DW_ALIGN: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C filters of one slot of dw [SLOTS, R, S, K]. RAGGED: some strips have fewer than ROWS rows."""
    EVEN: tl.constexpr = K % BLOCK_C == 0
    TILES_K: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C  # vary fastest: programs that run together read whole pixels
    slot = tl.program_id(0) // TILES_K
    k = tl.program_id(0) % TILES_K * BLOCK_C + tl.arange(0, BLOCK_C)
    k_ok = k < K
    tiles = tl.cdiv(N * strips * Q, BLOCK_M)
    part = tl.cdiv(tiles, SLOTS)
    first = slot * part
    last = tl.minimum(first + part, tiles)

    x_cols = x_ptr + channel_offset(k // MULTIPLIER, x_stride_c)[None, :]
    dy_cols = dy_ptr + channel_offset(k, dy_stride_c)[None, :]
    dw_row = dw_stride_r * DW_ALIGN
    dw_column = dw_stride_s * DW_ALIGN
    dw_cols = dw_ptr + slot.to(tl.int64) * dw_stride_slot + channel_offset(k, dw_stride_k)
    for r0 in tl.static_range(0, R, TAPS):
        for s0 in range(0, S, COLUMNS):
            sum_taps(
                x_cols, dy_cols, dw_cols, first, last, r0, s0, N, H, W, P, Q, strips, strips_magic, strips_shift, q_magic, q_shift,
                x_stride_n, x_stride_h, x_stride_w, dy_stride_n, dy_stride_h, dy_stride_w, dw_row, dw_column, k_ok,
                STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, X_ALIGN, DY_ALIGN,
                min(TAPS, R - r0), COLUMNS, RAGGED, EVEN, ACC, ROWS, BLOCK_M, BLOCK_C, FAR,
            )  # fmt: skip


def plan_depthwise_wgrad(problem: ConvProblem, tile: StripTile, x: Laid, dy: Laid, dw: Laid) -> WgradLaunches:
    """Takes (x, dy, dw); see `depthwise_wgrad`. dy must not be empty."""
    g, slots = problem, tile.SPLIT_K
    strips = cdiv(g.P, tile.ROWS)
    acc = accumulator_dtype(x.dtype)
    gradient = slot = filters_as_channels(dw)
    workspace = None
    if slots > 1:
        slot = dense((1, g.K, g.R, g.S), acc, torch.channels_last)
        workspace = dense((slots, g.R, g.S, g.K), acc)
    slot_stride = g.R * g.S * g.K
    xs, dys, dws = strides_nhwc(x), strides_nhwc(dy), strides_nhwc(slot)
    partials = launch.Launch(
        depthwise_wgrad_kernel, (slots * cdiv(g.K, tile.BLOCK_C),),
        g.N, g.H, g.W, g.P, g.Q, slots, strips, *divisor(max(strips, 1)), *divisor(max(g.Q, 1)), *xs[:4], *dys[:4], slot_stride, *dws[1:4],
        tile=tile, K=g.K, MULTIPLIER=g.group_filters, R=g.R, S=g.S,
        STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w, DIL_H=g.dil_h, DIL_W=g.dil_w,
        X_ALIGN=xs.align, DY_ALIGN=dys.align, DW_ALIGN=dws.align,
        TAPS=taps_at_once(g.R), COLUMNS=columns_at_once(g.R, g.S), RAGGED=g.P % tile.ROWS > 0, ACC=KERNEL_DTYPES[acc],
        ROWS=tile.ROWS, BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return WgradLaunches(partials, workspace, plan_reduction(slots, slot_stride, gradient))


def depthwise_wgrad(problem: ConvProblem, tile: StripTile, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor) -> None:
    """Writes every element of dw, the gradient of a depthwise convolution's weights, from tile.SPLIT_K partial sums.

    Shapes: x [N, C, H, W], dy [N, K, P, Q], dw [K, 1, R, S], in any memory layout.
    """
    if dy.numel() == 0:
        dw.zero_()
    else:
        plan_depthwise_wgrad(problem, tile, x, dy, dw)(WgradOperands(x, dy, dw))
