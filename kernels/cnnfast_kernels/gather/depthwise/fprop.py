"""Depthwise convolution forward.

    y[n, p, q, k] = sum over r, s of x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c]
                                     * w[k, r, s]    where c = k // MULTIPLIER

The filter is taken column by column: the weights of one, up to seven taps of it at a time, are in registers while the
rows that a strip meets are loaded one after the other.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ... import launch
from ...epilogue import (
    PLAIN,
    Channels,
    Epilogue,
    Finish,
    Residual,
    finish,
    finish_of,
    load_channels,
    load_residual,
)
from ...indexing import (
    channel_offset,
    dense_channel_offset,
    dense_pixel_offset,
    dense_row_stride,
    divisor,
    pixel_offset,
)
from ...layout import FpropMemory, Laid, Strides, dense_alignment, strides_nhwc
from ...moments import TileRows
from ...operands import FpropOperands
from ...problem import ConvProblem
from ...tile_moments import store_moments
from ...tiling import MAX_REGISTERS, cdiv
from .filters import StripLaunch, filters_layout
from .strips import (
    StripBlock,
    StripPixels,
    StripRows,
    Strips,
    accumulate_column,
    in_range,
    locate_strips,
    mask_row,
    masks_of_strips,
    zeros,
)
from .tiles import StripTile, taps_at_once

EXTENTS = ["N", "H", "W", "P", "Q", "strips_per_column"]
DIVISORS = ["strips_magic", "strips_shift", "q_magic", "q_shift"]
STRIDES = [f"{t}_stride_{d}" for t in ("x", "residual") for d in "nhwc"]


@triton.jit(do_not_specialize=EXTENTS + DIVISORS + STRIDES)
@no_type_check
def depthwise_fprop_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual_ptr, beside_ptr,
    slopes_ptr, N, H, W, P, Q, strips_per_column, strips_magic, strips_shift, q_magic, q_shift,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    w_stride_r, w_stride_s, w_stride_k,
    residual_stride_n, residual_stride_h, residual_stride_w, residual_stride_c,
    g: tl.constexpr, e: tl.constexpr, memory: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """BLOCK_M strips of BLOCK_C filters of y; `beside`, moments [tiles, 2, K].

    g: ConvGeometry of groups of one channel; e: Finish; memory: FpropMemory; block: StripBlock.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    MULTIPLIER: tl.constexpr = g.K  # filters of a channel
    K: tl.constexpr = g.groups * g.K
    R: tl.constexpr = g.R
    TAPS: tl.constexpr = block.TAPS
    ROWS: tl.constexpr = block.ROWS
    BLOCK_M: tl.constexpr = block.BLOCK_M
    BLOCK_C: tl.constexpr = block.BLOCK_C
    TILES_K: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C  # vary fastest: programs that run together read whole pixels
    tile = tl.program_id(0) // TILES_K
    strips = Strips(N, strips_per_column, strips_magic, strips_shift, Q, q_magic, q_shift)
    n, i, q, ok = locate_strips(tile, strips, BLOCK_M)
    k = tl.program_id(0) % TILES_K * BLOCK_C + tl.arange(0, BLOCK_C)
    k_ok = k < K
    channels_ok = None if K % BLOCK_C == 0 else k_ok

    p = i * ROWS
    h0 = p * g.stride_h - g.pad_h
    w0 = q * g.stride_w - g.pad_w
    x_strides = Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, memory.x_align)
    x_row = x_stride_h.to(tl.int64) * memory.x_align
    x_column = x_stride_w.to(tl.int64) * memory.x_align
    w_row = w_stride_r * memory.w_align
    w_column = w_stride_s * memory.w_align
    x_pixels = x_ptr + pixel_offset(n, h0, w0, x_strides)[:, None]
    x_pixels = x_pixels + channel_offset(k // MULTIPLIER, x_stride_c)[None, :]
    # every thread loads its own
    w_taps = w_ptr + tl.zeros((BLOCK_M,), tl.int32)[:, None] + channel_offset(k, w_stride_k)[None, :]
    h0 = mask_row(h0, ok)

    acc = zeros(ROWS, BLOCK_M, BLOCK_C, ACC)
    for r0 in tl.static_range(0, R, TAPS):
        for s in range(g.S):
            row = mask_row(h0 + r0 * g.dil_h, in_range(w0 + s * g.dil_w, W))
            rows = StripRows(x_pixels + (r0 * g.dil_h * x_row + s * g.dil_w * x_column), row, H, x_row)
            acc = accumulate_column(
                acc, rows, w_taps + (r0 * w_row + s * w_column), w_row, channels_ok,
                min(TAPS, R - r0), g.stride_h, g.dil_h, 1,
            )  # fmt: skip

    of_channels = Channels(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slopes_ptr)
    channels = load_channels(of_channels, k, k_ok, e)
    m = (n * P + p) * Q + q
    y_pixels = y_ptr + dense_pixel_offset(m, n, P, Q, K, memory.y_channels_last, memory.y_align)[:, None]
    y_pixels = y_pixels + dense_channel_offset(k, P, Q, memory.y_channels_last)[None, :]
    y_row = dense_row_stride(Q, K, memory.y_channels_last)
    residual_strides = Strides(
        residual_stride_n, residual_stride_h, residual_stride_w, residual_stride_c, memory.residual_align
    )
    stored = ()
    for t in tl.static_range(ROWS):
        row_ok = ok & (p + t < P)
        mask = row_ok[:, None] & k_ok[None, :]
        residual = Residual(residual_ptr, (n, p + t, q), k, row_ok, k_ok, residual_strides)
        y = finish(acc[t], channels, residual, of_channels, e, load_residual).to(y_ptr.dtype.element_ty)
        tl.store(y_pixels + t * y_row, y, mask=mask)
        stored = stored + (y,)
    if beside_ptr is not None:
        whole = (P % ROWS == 0) & (N * strips_per_column * Q - tile * BLOCK_M >= BLOCK_M)
        store_moments(beside_ptr, tile, stored, StripPixels(whole, ok, p, P, ROWS), k, k_ok, K, masks_of_strips)


def plan_depthwise_fprop(
    problem: ConvProblem,
    tile: StripTile,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    e: Finish | None = None,
) -> StripLaunch[FpropOperands]:
    """See `depthwise_fprop`."""
    g = problem
    strips = cdiv(g.P, tile.ROWS)
    grid = (cdiv(g.N * strips * g.Q, tile.BLOCK_M) * cdiv(g.K, tile.BLOCK_C),)
    ws, copies = filters_layout(w, tile)
    xs = strides_nhwc(x)
    rs = xs if residual is None else strides_nhwc(residual)
    run = launch.Launch(
        depthwise_fprop_kernel, grid, g.N, g.H, g.W, g.P, g.Q,
        strips, *divisor(max(strips, 1)), *divisor(max(g.Q, 1)), *xs[:4], *ws[1:4], *rs[:4],
        tile=tile, g=g.geometry(C=1, K=g.group_filters),
        e=e or finish_of(x.dtype),
        memory=FpropMemory(xs.align, ws.align, rs.align, *dense_alignment(y)),
        block=StripBlock(tile.BLOCK_M, tile.BLOCK_C, tile.ROWS, taps_at_once(g.R)),
        num_warps=tile.num_warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return StripLaunch(run, copies)


def moments_rows(problem: ConvProblem, tile: StripTile) -> TileRows:
    """Which pixels of y the moments of each tile are of."""
    g = problem
    strips = cdiv(g.P, tile.ROWS)
    return TileRows(max(strips, 1), g.P, tile.ROWS, max(g.Q, 1), tile.BLOCK_M, g.N * strips * g.Q)


def depthwise_fprop(
    problem: ConvProblem,
    tile: StripTile,
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue = PLAIN,
    moments: torch.Tensor | None = None,
) -> None:
    """Writes y, what `epilogue` makes of conv(x, w), and, if asked, the (mean, biased variance) of each tile of y;
    `moments_rows` tells which pixels those are.

    Shapes: x [N, C, H, W], w [K, 1, R, S] and the residual [N, K, P, Q] in any memory layout, y [N, K, P, Q] dense,
    channels_last or contiguous; bias and those of the batch norm [K]; moments [tiles, 2, K] in the accumulator's dtype.
    """
    e = epilogue
    plan = plan_depthwise_fprop(problem, tile, x, w, y, e.residual, e.compiled(x.dtype))
    plan(FpropOperands(x, w, y, e.bias, *e.norm[:4], e.residual, moments, e.slopes))
