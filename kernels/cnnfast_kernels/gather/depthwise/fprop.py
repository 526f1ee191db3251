"""Depthwise convolution forward.

    y[n, p, q, k] = sum over r, s of x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c] * w[k, r, s]
    where c = k // MULTIPLIER

The filter is taken column by column: the weights of one, up to seven taps of it at a time, are in registers while a
strip's rows go by.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from ... import launch
from ...dtypes import KERNEL_DTYPES, accumulator_dtype
from ...epilogue import PLAIN, Channels, Epilogue, Finish, finish, load_channels, store_moments
from ...indexing import channel_offset, divisor, pixel_offset
from ...layout import Laid, Strides, strides_nhwc
from ...operands import FpropOperands
from ...partials import TileRows
from ...problem import ConvProblem
from ...tiling import MAX_REGISTERS, cdiv
from .strips import FAR, StripPlan, accumulate_column, filters_layout, in_range, locate_strips, zeros
from .tiles import StripTile, taps_at_once

EXTENTS = ["N", "H", "W", "P", "Q", "strips", "strips_magic", "strips_shift", "q_magic", "q_shift"]
STRIDES = [f"{t}_stride_{d}" for t in ("x", "y", "residual") for d in "nhwc"]


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
@no_type_check
def depthwise_fprop_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual_ptr, moments_ptr, slope: tl.float64, N, H, W, P, Q,
    strips, strips_magic, strips_shift, q_magic, q_shift,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    w_stride_r, w_stride_s, w_stride_k,
    y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    residual_stride_n, residual_stride_h, residual_stride_w, residual_stride_c,
    K: tl.constexpr, MULTIPLIER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, RESIDUAL_ALIGN: tl.constexpr,
    e: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_M strips of BLOCK_C filters of y; `moments` [tiles, 2, K]."""
    ACC: tl.constexpr = e.acc
    EVEN: tl.constexpr = K % BLOCK_C == 0
    TILES_K: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C  # vary fastest: programs that run together read whole pixels
    tile = tl.program_id(0) // TILES_K
    n, i, q, ok = locate_strips(tile, N, strips, Q, strips_magic, strips_shift, q_magic, q_shift, BLOCK_M)
    k = tl.program_id(0) % TILES_K * BLOCK_C + tl.arange(0, BLOCK_C)
    k_ok = k < K

    p = i * ROWS
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    x_row = x_stride_h.to(tl.int64) * X_ALIGN
    x_column = x_stride_w.to(tl.int64) * X_ALIGN
    w_row = w_stride_r * W_ALIGN
    w_column = w_stride_s * W_ALIGN
    x_rows = x_ptr + pixel_offset(n, h0, w0, Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, X_ALIGN))[:, None]
    x_rows = x_rows + channel_offset(k // MULTIPLIER, x_stride_c)[None, :]
    # every thread loads its own
    w_taps = w_ptr + tl.zeros((BLOCK_M,), tl.int32)[:, None] + channel_offset(k, w_stride_k)[None, :]
    h0 = tl.where(ok, h0, FAR)

    acc = zeros(ROWS, BLOCK_M, BLOCK_C, ACC)
    for r0 in tl.static_range(0, R, TAPS):
        for s in range(S):
            row = tl.where(in_range(w0 + s * DIL_W, W), h0 + r0 * DIL_H, FAR)
            acc = accumulate_column(
                acc, x_rows + (r0 * DIL_H * x_row + s * DIL_W * x_column), row, H, x_row, w_taps + (r0 * w_row + s * w_column), w_row, k_ok,
                ROWS, min(TAPS, R - r0), STRIDE_H, DIL_H, 1, EVEN, ACC,
            )  # fmt: skip

    of_channels = Channels(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr)
    channels = load_channels(of_channels, k, k_ok, e)
    y_rows = (
        y_ptr
        + pixel_offset(n, p, q, Strides(y_stride_n, y_stride_h, y_stride_w, y_stride_c, Y_ALIGN))[:, None]
        + channel_offset(k, y_stride_c)[None, :]
    )
    if residual_ptr is not None:
        residual_rows = (
            residual_ptr
            + pixel_offset(
                n,
                p,
                q,
                Strides(residual_stride_n, residual_stride_h, residual_stride_w, residual_stride_c, RESIDUAL_ALIGN),
            )[:, None]
        )
        residual_rows = residual_rows + channel_offset(k, residual_stride_c)[None, :]
    stored = ()
    exist = ()
    for t in tl.static_range(ROWS):
        row_ok = ok & (p + t < P)
        mask = row_ok[:, None] & k_ok[None, :]
        residual = None
        if residual_ptr is not None:
            residual_row = residual_stride_h.to(tl.int64) * RESIDUAL_ALIGN
            residual = tl.load(residual_rows + t * residual_row, mask=mask, other=0.0)
        y = finish(acc[t], channels, residual, slope, of_channels, e).to(y_ptr.dtype.element_ty)
        tl.store(y_rows + t * y_stride_h.to(tl.int64) * Y_ALIGN, y, mask=mask)
        stored = stored + (y.to(ACC),)
        exist = exist + (row_ok,)
    if moments_ptr is not None:
        store_moments(moments_ptr, tile, stored, exist, k, k_ok, K)


def plan_depthwise_fprop(
    problem: ConvProblem,
    tile: StripTile,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    slope: float = 0.0,
) -> StripPlan:
    """Takes (x, w, y, bias, mean, var, gamma, beta, residual, moments), each of the last seven or None; see
    `depthwise_fprop`.
    """
    g = problem
    strips = cdiv(g.P, tile.ROWS)
    grid = (cdiv(g.N * strips * g.Q, tile.BLOCK_M) * cdiv(g.K, tile.BLOCK_C),)
    ws, copies = filters_layout(w, tile)
    xs, ys = strides_nhwc(x), strides_nhwc(y)
    zs = ys if residual is None else strides_nhwc(residual)
    run = launch.Launch(
        depthwise_fprop_kernel, grid, slope, g.N, g.H, g.W, g.P, g.Q, strips, *divisor(max(strips, 1)), *divisor(max(g.Q, 1)),
        *xs[:4], *ws[1:4], *ys[:4], *zs[:4],
        tile=tile, K=g.K, MULTIPLIER=g.group_filters, R=g.R, S=g.S,
        STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w, DIL_H=g.dil_h, DIL_W=g.dil_w,
        X_ALIGN=xs.align, W_ALIGN=ws.align, Y_ALIGN=ys.align, RESIDUAL_ALIGN=zs.align,
        e=Finish(eps, activation, KERNEL_DTYPES[accumulator_dtype(x.dtype)]), TAPS=taps_at_once(g.R),
        ROWS=tile.ROWS, BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return StripPlan(run, copies)


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
    """Writes y, what `epilogue` makes of conv(x, w), and, if asked, the (mean, M2) of each tile of y; moments_rows
    tells of which pixels.

    Shapes: x [N, C, H, W], w [K, 1, R, S], y and the residual [N, K, P, Q], in any memory layout; bias and those of the
    batch norm [K]; moments [tiles, 2, K] in the accumulator's dtype.
    """
    e = epilogue
    plan = plan_depthwise_fprop(problem, tile, x, w, y, e.residual, e.norm.eps, e.activation, e.slope)
    plan(FpropOperands(x, w, y, e.bias, *e.norm[:4], e.residual, moments))
