"""Convolution forward as an implicit GEMM.

    y[n, p, q, k] = sum over r, s, c of x[n, h, w, c] * w[k, r, s, c]
    where h = p * stride_h - pad_h + r * dil_h, w = q * stride_w - pad_w + s * dil_w

GEMM_M = N * P * Q output pixels, GEMM_N = K filters, GEMM_K = R * S * C, one GEMM a group; the matrix of
patches is never stored: each tile of it is gathered from x when it is needed. 1x1 convolutions are the case R = S = 1.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..epilogue import (
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
from ..indexing import channel_offset, dense_channel_offset, dense_pixel_offset, has_nan, pixel_offset, unravel_npq
from ..layout import FpropMemory, Laid, Strides, dense_alignment, strides_nhwc
from ..operands import FpropOperands
from ..problem import ConvProblem
from ..tile_moments import FirstRows, masks_of_first, store_moments
from ..tiling import Precision, TileConfig, cdiv, register_limit
from ..words import store_bits
from .tiles import Rows, hide_steps, load_taps, multiply_accumulate, tap_bits, unravel_rsc

EXTENTS = ["N", "H", "W", "P", "Q"]
STRIDES = [f"{t}_stride_{d}" for t in ("x", "residual") for d in "nhwc"]


@triton.jit
@no_type_check
def load_filters(columns, step, k_ok, strides, EVEN: tl.constexpr):
    """The weights that a k-step needs: [BLOCK_K, BLOCK_N].

    columns: pointers to the filters. step: (r, s, c, c_ok) of unravel_rsc. EVEN: all of `c` exist.
    """
    r, s, c, c_ok = step
    mask = k_ok[None, :] if EVEN else k_ok[None, :] & c_ok[:, None]
    taps = (r.to(tl.int64) * strides.h + s.to(tl.int64) * strides.w) * strides.align + channel_offset(c, strides.c)
    return tl.load(columns[None, :] + taps[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
@no_type_check
def conv_fprop_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual_ptr, beside_ptr,
    slopes_ptr, N, H, W, P, Q, K,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    w_stride_k, w_stride_r, w_stride_s, w_stride_c,
    residual_stride_n, residual_stride_h, residual_stride_w, residual_stride_c,
    g: tl.constexpr, e: tl.constexpr, memory: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y, and what it leaves beside y, if anything: moments [tiles, 2, K * groups], or, if e.words, words
    [ceil(N * P * Q / 32), K * groups] of bits. K are the filters of a group.

    g: ConvGeometry, with the channels of a group; e: Finish; memory: FpropMemory.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    C: tl.constexpr = g.C
    OWN: tl.constexpr = memory.own
    FLAT: tl.constexpr = C < BLOCK_K and g.R * g.S > 1
    STEPS_C: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (g.R * g.S * C + BLOCK_K - 1) // BLOCK_K if FLAT else g.R * g.S * STEPS_C
    EVEN: tl.constexpr = C % BLOCK_K == 0

    # Filters vary fastest: programs that run together share their pixels.
    M = N * P * Q
    tiles_k = tl.cdiv(K, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = pid // tiles_k % tiles_m
    group = pid // tiles_k // tiles_m

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q, row_ok = unravel_npq(m, M, P, Q)
    k = pid % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k < K

    h0 = p * g.stride_h - g.pad_h
    w0 = q * g.stride_w - g.pad_w
    x_strides = Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, memory.x_align)
    x_pixels = x_ptr + pixel_offset(n, h0, w0, x_strides) + channel_offset(group * C, x_stride_c)
    w_strides = Strides(w_stride_k, w_stride_r, w_stride_s, w_stride_c, memory.w_align)
    w_cols = w_ptr + (group * K + k).to(tl.int64) * w_stride_k * memory.w_align
    bits = None if FLAT or g.R * g.S > 31 else tap_bits(h0, w0, row_ok, H, W, g.R, g.S, g.dil_h, g.dil_w)
    rows = Rows(x_pixels, h0, w0, row_ok, bits)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(hide_steps(STEPS, M, BLOCK_M * BLOCK_N)):
        r, s, c, c_ok = unravel_rsc(step, C, g.R, g.S, BLOCK_K, FLAT)
        x = load_taps(rows, (r, s, c, c_ok), H, W, x_strides, g.S, g.dil_h, g.dil_w, FLAT, EVEN)
        w = load_filters(w_cols, (r, s, c, c_ok), k_ok, w_strides, EVEN)
        acc = multiply_accumulate(x, w, acc, PRECISION)

    # Where a channel that is no filter's is infinite or NaN, its product with zero is NaN, which is seldom: then the
    # tile is summed again without it. The compiler is not to know how many steps that takes: it would unroll them, and
    # take 50 registers for that.
    careful = False
    if OWN > 0:
        careful = has_nan(acc)
    if careful:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for step in tl.range(tl.minimum(STEPS, H * STEPS), num_stages=1):
            r, s, c, c_ok = unravel_rsc(step, C, g.R, g.S, BLOCK_K, FLAT)
            c_ok = c_ok & (c < OWN)
            x = load_taps(rows, (r, s, c, c_ok), H, W, x_strides, g.S, g.dil_h, g.dil_w, FLAT, False)
            w = load_filters(w_cols, (r, s, c, c_ok), k_ok, w_strides, False)
            acc = multiply_accumulate(x, w, acc, PRECISION)

    column = group * K + k
    residual_strides = Strides(
        residual_stride_n, residual_stride_h, residual_stride_w, residual_stride_c, memory.residual_align
    )
    residual = Residual(residual_ptr, (n, p, q), column, row_ok, k_ok, residual_strides)
    of_channels = Channels(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slopes_ptr)
    channels = load_channels(of_channels, column, k_ok, e)
    z = finish(acc, channels, residual, of_channels, e, load_residual)
    y = z.to(y_ptr.dtype.element_ty)
    y_pixels = dense_pixel_offset(m, n, P, Q, K * g.groups, memory.y_channels_last, memory.y_align)
    y_columns = dense_channel_offset(column, P, Q, memory.y_channels_last)
    tl.store((y_ptr + y_pixels)[:, None] + y_columns[None, :], y, mask=row_ok[:, None] & k_ok[None, :])
    if beside_ptr is not None:
        if e.words:
            store_bits(beside_ptr, tile_m * BLOCK_M, M, column, k_ok, K * g.groups, z, y.dtype)
        else:
            rows = FirstRows(M - tile_m * BLOCK_M >= BLOCK_M, M - tile_m * BLOCK_M)
            store_moments(beside_ptr, tile_m, (y,), rows, column, k_ok, K * g.groups, masks_of_first)


def plan_fprop(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    e: Finish | None = None,
    own: int = 0,
) -> launch.Launch[FpropOperands]:
    """See `fprop`. own: the channels that filters have, if w has weights of zero for those of x behind them, which may
    be infinite or NaN.
    """
    g = problem
    grid = (cdiv(g.N * g.P * g.Q, tile.BLOCK_M) * cdiv(g.group_filters, tile.BLOCK_N) * g.groups,)
    xs, ws = strides_nhwc(x), strides_nhwc(w)
    rs = xs if residual is None else strides_nhwc(residual)
    return launch.Launch(
        conv_fprop_kernel, grid, g.N, g.H, g.W, g.P, g.Q, g.group_filters, *xs[:4], *ws[:4], *rs[:4],
        tile=tile, g=g.geometry(C=g.group_channels),
        e=e or finish_of(x.dtype),
        memory=FpropMemory(xs.align, ws.align, rs.align, *dense_alignment(y), 0 if own == g.C else own),
        PRECISION=precision, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=register_limit(g, "fprop", precision, tile),
    )  # fmt: skip


def fprop(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue = PLAIN,
    beside: torch.Tensor | None = None,
    words: bool = False,
) -> None:
    """Writes y, which is what `epilogue` makes of conv(x, w), and, if asked, beside it: the mean and the biased
    variance of each tile of BLOCK_M pixels of y, or its words of bits (words.py), which a tile has whole.

    Shapes: x [N, C, H, W], w [K, C / groups, R, S] and the residual [N, K, P, Q] in any memory layout; y [N, K, P, Q]
    dense, channels_last or contiguous; bias and those of the batch norm [K]; beside: moments
    [ceil(N * P * Q / BLOCK_M), 2, K] in the accumulator's dtype, or words [ceil(N * P * Q / 32), K] in int32. Raises
    ValueError if y is not dense.
    """
    e = epilogue
    prepared = plan_fprop(problem, tile, precision, x, w, y, e.residual, e.compiled(x.dtype)._replace(words=words))
    prepared(FpropOperands(x, w, y, e.bias, *e.norm[:4], e.residual, beside, e.slopes))
