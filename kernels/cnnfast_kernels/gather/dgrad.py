"""Gradient of a convolution's input as an implicit GEMM.

    dx[n, h, w, c] = sum over r, s, k of dy[n, p, q, k] * w[k, r, s, c]    where p * stride_h = h + pad_h - r * dil_h, q alike

With a stride most (h, r) pairs meet no p. Pixels with the same h mod stride_h meet the same taps, a stride /
gcd(stride, dilation) apart, so the pixels are sorted into stride_h * stride_w classes, and within a class the sum is a
correlation of stride 1 over dy: no work is spent on zeros, and all classes run in one launch. A class that meets no tap
writes zeros.

GEMM_M = N * H * W input pixels of a class, GEMM_N = C channels, GEMM_K = taps of the class * K, one GEMM a group.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..indexing import channel_offset, class_axis, has_nan, pixel_offset, unravel_npq
from ..layout import Laid, Strides, strides_nhwc
from ..operands import DgradOperands
from ..problem import ConvProblem, tap_step
from ..tiling import Precision, TileConfig, cdiv, register_limit
from .tiles import Rows, load_taps, multiply_accumulate, reaches, tap_bits, unravel_rsc

EXTENTS = ["N", "H", "W", "P", "Q"]
STRIDES = [f"{t}_stride_{d}" for t in ("dy", "dx") for d in "nhwc"]
# Columns that the careful loop sums at a time: the fewest that a product may have.
CAREFUL_N = tl.constexpr(16)


@triton.jit
@no_type_check
def load_step(
    step, dy_rows, w_ptr, bits, p, q, row_ok, first_k, c, C, P, Q, r0, s0, taps_r, taps_s,
    dy_stride_h, dy_stride_w, dy_stride_c, w_stride_k, w_stride_r, w_stride_s, w_stride_c,
    K: tl.constexpr, MAX_S: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, P_STEP: tl.constexpr, Q_STEP: tl.constexpr,
    DY_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The operands of one k-step, dy [BLOCK_M, BLOCK_K] and w [BLOCK_K, BLOCK_N], and its tap, or taps, (r, s) within
    the class.
    """
    EVEN: tl.constexpr = K % BLOCK_K == 0
    tap_r, tap_s, k, k_ok = unravel_rsc(step, K, taps_r, taps_s, BLOCK_K, FLAT)
    rows = Rows(dy_rows, p, q, row_ok, bits)
    strides = Strides(0, dy_stride_h, dy_stride_w, dy_stride_c, DY_ALIGN)
    dy = load_taps(rows, (tap_r, tap_s, k, k_ok), P, Q, strides, MAX_S, P_STEP, Q_STEP, FLAT, EVEN)
    c_ok = (c < C)[None, :]
    r = (r0 + tap_r * STEP_H).to(tl.int64)
    s = (s0 + tap_s * STEP_W).to(tl.int64)
    w_rows = ((first_k + k).to(tl.int64) * w_stride_k + r * w_stride_r + s * w_stride_s) * W_ALIGN
    w_cols = w_ptr + channel_offset(c, w_stride_c)
    w = tl.load(w_cols[None, :] + w_rows[:, None], mask=c_ok if EVEN else c_ok & k_ok[:, None], other=0.0)
    return dy, w, tap_r, tap_s


@triton.jit
@no_type_check
def store_dx(
    dx_ptr, bias_ptr, acc, n, h, w, row_ok, column, c_ok, stride_n, stride_h, stride_w, stride_c, ALIGN: tl.constexpr
):
    """Rows of acc go to pixels (n, h, w), columns to channels `column` of all groups, plus the bias of these if there
    is one.
    """
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + column, mask=c_ok, other=0.0).to(acc.dtype)[None, :]
    dx_rows = dx_ptr + pixel_offset(n, h, w, Strides(stride_n, stride_h, stride_w, stride_c, ALIGN))
    dx = dx_rows[:, None] + channel_offset(column, stride_c)[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
@no_type_check
def conv_dgrad_kernel(
    dy_ptr, w_ptr, dx_ptr, bias_ptr, N, H, W, P, Q, C,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    w_stride_k, w_stride_r, w_stride_s, w_stride_c,
    dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, MISSES: tl.constexpr,
    DY_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dx, plus the bias of a transposed convolution if there is one. C and K are channels and filters of a
    group.

    MISSES: some pixel has taps that lie outside dy.
    """
    MAX_R: tl.constexpr = (R + STEP_H - 1) // STEP_H  # taps of the class that meets most
    MAX_S: tl.constexpr = (S + STEP_W - 1) // STEP_W
    FLAT: tl.constexpr = K < BLOCK_K and MAX_R * MAX_S > 1
    P_STEP: tl.constexpr = -(DIL_H * STEP_H // STRIDE_H)
    Q_STEP: tl.constexpr = -(DIL_W * STEP_W // STRIDE_W)

    # Channels vary fastest, then classes: programs that run together share their part of dy.
    tiles_c = tl.cdiv(C, BLOCK_N)
    tiles_m = tl.cdiv(N * tl.cdiv(H, STRIDE_H) * tl.cdiv(W, STRIDE_W), BLOCK_M)
    pid = tl.program_id(0)
    first_h = pid // tiles_c % STRIDE_H
    first_w = pid // tiles_c // STRIDE_H % STRIDE_W
    tile_m = pid // tiles_c // (STRIDE_H * STRIDE_W) % tiles_m
    group = pid // tiles_c // (STRIDE_H * STRIDE_W) // tiles_m

    rows, r0, taps_r, p0 = class_axis(first_h, H, R, STRIDE_H, PAD_H, DIL_H, STEP_H)
    cols, s0, taps_s, q0 = class_axis(first_w, W, S, STRIDE_W, PAD_W, DIL_W, STEP_W)
    M = N * rows * cols
    n, i, j, row_ok = unravel_npq(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M, rows, cols)
    c = pid % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    h = first_h + i * STRIDE_H
    w_pixel = first_w + j * STRIDE_W

    p = p0 + i
    q = q0 + j
    dy_rows = (
        dy_ptr
        + pixel_offset(n, p, q, Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, DY_ALIGN))
        + channel_offset(group * K, dy_stride_c)
    )
    bits = None if FLAT or MAX_R * MAX_S > 31 else tap_bits(p, q, row_ok, P, Q, MAX_R, MAX_S, P_STEP, Q_STEP)

    taps = taps_r * taps_s
    careful_steps = taps * ((K + BLOCK_K - 1) // BLOCK_K)
    steps = tl.cdiv(taps * K, BLOCK_K) if FLAT else careful_steps
    if STRIDE_H * STRIDE_W > 1:
        steps = tl.where(tile_m * BLOCK_M < M, steps, 0)  # classes differ in size: a smaller one has fewer tiles
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(steps):
        dy, w, _, _ = load_step(
            step, dy_rows, w_ptr, bits, p, q, row_ok, group * K, c, C, P, Q, r0, s0, taps_r, taps_s,
            dy_stride_h, dy_stride_w, dy_stride_c, w_stride_k, w_stride_r, w_stride_s, w_stride_c,
            K, MAX_S, STEP_H, STEP_W, P_STEP, Q_STEP, DY_ALIGN, W_ALIGN, BLOCK_K, FLAT,
        )  # fmt: skip
        acc = multiply_accumulate(dy, w, acc, PRECISION)

    # Where a tap misses dy, its zero stands for nothing and must not meet a weight that is infinite or NaN. Where it
    # did, a sum is NaN, which is seldom: then the tile is summed again, one tap a step, and pixels that the tap does
    # not reach keep what they had. This is done for a few columns at a time: each sum is there in two versions, and
    # more of them would take registers from the loop above.
    careful = False
    if MISSES:
        careful = has_nan(acc)
    if careful:
        for block in tl.range(BLOCK_N // CAREFUL_N, num_stages=1):
            columns = pid % tiles_c * BLOCK_N + block * CAREFUL_N + tl.arange(0, CAREFUL_N)
            part = tl.zeros((BLOCK_M, CAREFUL_N), ACC)
            for step in tl.range(careful_steps, num_stages=1):
                dy, w, tap_r, tap_s = load_step(
                    step, dy_rows, w_ptr, bits, p, q, row_ok, group * K, columns, C, P, Q, r0, s0, taps_r, taps_s,
                    dy_stride_h, dy_stride_w, dy_stride_c, w_stride_k, w_stride_r, w_stride_s, w_stride_c,
                    K, MAX_S, STEP_H, STEP_W, P_STEP, Q_STEP, DY_ALIGN, W_ALIGN, BLOCK_K, False,
                )  # fmt: skip
                reached = reaches(Rows(dy_rows, p, q, row_ok, bits), tap_r, tap_s, P, Q, MAX_S, P_STEP, Q_STEP)
                part = tl.where(reached[:, None], multiply_accumulate(dy, w, part, PRECISION), part)
            store_dx(
                dx_ptr, bias_ptr, part, n, h, w_pixel, row_ok, group * C + columns, columns < C,
                dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, DX_ALIGN,
            )  # fmt: skip
    else:
        store_dx(
            dx_ptr, bias_ptr, acc, n, h, w_pixel, row_ok, group * C + c, c < C,
            dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, DX_ALIGN,
        )  # fmt: skip


def plan_dgrad(
    problem: ConvProblem, tile: TileConfig, precision: Precision, dy: Laid, w: Laid, dx: Laid
) -> launch.Launch:
    """Takes (dy, w, dx, bias); see `dgrad`."""
    g = problem
    pixels = g.N * cdiv(g.H, g.stride_h) * cdiv(g.W, g.stride_w)  # of the largest class
    grid = (cdiv(pixels, tile.BLOCK_M) * g.parities * cdiv(g.group_channels, tile.BLOCK_N) * g.groups,)
    dys, ws, dxs = strides_nhwc(dy), strides_nhwc(w), strides_nhwc(dx)
    return launch.Launch(
        conv_dgrad_kernel, grid, g.N, g.H, g.W, g.P, g.Q, g.group_channels, *dys[:4], *ws[:4], *dxs[:4],
        tile=tile, K=g.group_filters, R=g.R, S=g.S,
        STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w, DIL_H=g.dil_h, DIL_W=g.dil_w,
        STEP_H=tap_step(g.stride_h, g.dil_h), STEP_W=tap_step(g.stride_w, g.dil_w),
        MISSES=g.taps_miss_h or g.taps_miss_w, DY_ALIGN=dys.align, W_ALIGN=ws.align, DX_ALIGN=dxs.align,
        PRECISION=precision, ACC=KERNEL_DTYPES[accumulator_dtype(dx.dtype)],
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps, num_stages=tile.num_stages,
        maxnreg=register_limit(g, "dgrad", precision, tile),
    )  # fmt: skip


def dgrad(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Writes every element of dx, the gradient of a convolution's input, or with `bias` the result of a transposed
    convolution.

    Shapes: dy [N, K, P, Q], w [K, C / groups, R, S], dx [N, C, H, W], in any memory layout; bias [C].
    """
    plan_dgrad(problem, tile, precision, dy, w, dx)(DgradOperands(dy, w, dx, bias))
