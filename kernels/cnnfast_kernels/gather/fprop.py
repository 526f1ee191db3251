"""Convolution forward as an implicit GEMM.

    y[n, p, q, k] = sum over r, s, c of x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c] * w[k, r, s, c]

GEMM_M = N * P * Q output pixels, GEMM_N = K filters, GEMM_K = R * S * C, one GEMM a group; the matrix of
patches is never stored: each tile of it is gathered from x when it is needed. 1x1 convolutions are the case R = S = 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import launch
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..epilogue import PLAIN, Epilogue, activate, normalize_columns, tile_moments
from ..indexing import channel_offset, pixel_offset, unravel_npq
from ..layout import Laid, strides_nhwc
from ..problem import ConvProblem
from ..tiling import Precision, TileConfig, cdiv, register_limit
from .tiles import load_taps, multiply_accumulate, tap_bits, unravel_rsc

EXTENTS = ["N", "H", "W", "P", "Q"]
STRIDES = [f"{t}_stride_{d}" for t in ("x", "y", "z") for d in "nhwc"]


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
def conv_fprop_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, z_ptr, moments_ptr, slope: tl.float64, N, H, W, P, Q, K,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    w_stride_k, w_stride_r, w_stride_s, w_stride_c,
    y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    z_stride_n, z_stride_h, z_stride_w, z_stride_c,
    C: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y. C and K are channels and filters of a group; z is the residual; `moments` [tiles, 2, K * GROUPS]."""
    FLAT: tl.constexpr = C < BLOCK_K and R * S > 1
    STEPS: tl.constexpr = (R * S * C + BLOCK_K - 1) // BLOCK_K if FLAT else R * S * ((C + BLOCK_K - 1) // BLOCK_K)
    EVEN: tl.constexpr = C % BLOCK_K == 0

    # Filters vary fastest: programs that run together share their pixels.
    M = N * P * Q
    tiles_k = tl.cdiv(K, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = pid // tiles_k % tiles_m
    group = pid // tiles_k // tiles_m

    n, p, q, row_ok = unravel_npq(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M, P, Q)
    k = pid % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k < K

    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    x_rows = (
        x_ptr
        + pixel_offset(n, h0, w0, x_stride_n, x_stride_h, x_stride_w, X_ALIGN)
        + channel_offset(group * C, x_stride_c)
    )
    w_cols = w_ptr + (group * K + k).to(tl.int64) * w_stride_k * W_ALIGN
    bits = None if FLAT or R * S > 31 else tap_bits(h0, w0, row_ok, H, W, R, S, DIL_H, DIL_W)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(STEPS):
        r, s, c, c_ok = unravel_rsc(step, C, R, S, BLOCK_K, FLAT)
        x = load_taps(
            x_rows, bits, h0, w0, row_ok, r, s, c, c_ok, H, W, x_stride_h, x_stride_w, x_stride_c,
            S, DIL_H, DIL_W, X_ALIGN, FLAT, EVEN,
        )  # fmt: skip
        w_mask = k_ok[None, :] if EVEN else k_ok[None, :] & c_ok[:, None]
        w_taps = (r.to(tl.int64) * w_stride_r + s.to(tl.int64) * w_stride_s) * W_ALIGN + channel_offset(c, w_stride_c)
        w = tl.load(w_cols[None, :] + w_taps[:, None], mask=w_mask, other=0.0)
        acc = multiply_accumulate(x, w, acc, PRECISION)

    column = group * K + k
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + column, mask=k_ok, other=0.0).to(ACC)[None, :]
    if mean_ptr is not None:
        acc = normalize_columns(acc, mean_ptr, var_ptr, gamma_ptr, beta_ptr, column, k_ok, EPS, ACC)
    mask = row_ok[:, None] & k_ok[None, :]
    if z_ptr is not None:
        z_rows = z_ptr + pixel_offset(n, p, q, z_stride_n, z_stride_h, z_stride_w, Z_ALIGN)
        acc = acc + tl.load(z_rows[:, None] + channel_offset(column, z_stride_c)[None, :], mask=mask, other=0.0).to(ACC)
    y = activate(acc, tl.full((), slope, ACC), ACTIVATION).to(y_ptr.dtype.element_ty)
    y_rows = y_ptr + pixel_offset(n, p, q, y_stride_n, y_stride_h, y_stride_w, Y_ALIGN)
    tl.store(y_rows[:, None] + channel_offset(column, y_stride_c)[None, :], y, mask=mask)
    if moments_ptr is not None:  # of y as stored: batch norm normalises exactly what backward will read
        mean, variance = tile_moments((y.to(ACC),), (row_ok,))
        row = moments_ptr + tile_m.to(tl.int64) * 2 * K * GROUPS + column
        tl.store(row, mean, mask=k_ok)
        tl.store(row + K * GROUPS, variance, mask=k_ok)


def plan_fprop(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    slope: float = 0.0,
) -> launch.Launch:
    """Takes (x, w, y, bias, mean, var, gamma, beta, residual, moments), each of the last seven or None; see `fprop`."""
    g = problem
    grid = (cdiv(g.N * g.P * g.Q, tile.BLOCK_M) * cdiv(g.group_filters, tile.BLOCK_N) * g.groups,)
    xs, ws, ys = strides_nhwc(x), strides_nhwc(w), strides_nhwc(y)
    zs = ys if residual is None else strides_nhwc(residual)
    return launch.Launch(
        conv_fprop_kernel, grid, slope, g.N, g.H, g.W, g.P, g.Q, g.group_filters, *xs[:4], *ws[:4], *ys[:4], *zs[:4],
        tile=tile, C=g.group_channels, GROUPS=g.groups, R=g.R, S=g.S,
        STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w, DIL_H=g.dil_h, DIL_W=g.dil_w,
        X_ALIGN=xs.align, W_ALIGN=ws.align, Y_ALIGN=ys.align, Z_ALIGN=zs.align,
        EPS=eps, ACTIVATION=activation, PRECISION=precision, ACC=KERNEL_DTYPES[accumulator_dtype(x.dtype)],
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps, num_stages=tile.num_stages,
        maxnreg=register_limit(g, "fprop", precision, tile),
    )  # fmt: skip


def fprop(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue = PLAIN,
    moments: torch.Tensor | None = None,
) -> None:
    """Writes y, what `epilogue` makes of conv(x, w), and, if asked, the (mean, M2) of each tile of BLOCK_M pixels of y.

    Shapes: x [N, C, H, W], w [K, C / groups, R, S], y and the residual [N, K, P, Q], in any memory layout; bias and
    those of the batch norm [K]; moments [ceil(N * P * Q / BLOCK_M), 2, K] in the accumulator's dtype.
    """
    e = epilogue
    plan = plan_fprop(problem, tile, precision, x, w, y, e.residual, e.norm.eps, e.activation, e.slope)
    plan(x, w, y, e.bias, *e.norm[:4], e.residual, moments)
