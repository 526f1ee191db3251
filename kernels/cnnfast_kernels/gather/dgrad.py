"""Gradient of a convolution's input as an implicit GEMM.

    dx[n, h, w, c] = sum over r, s, k of dy[n, p, q, k] * w[k, r, s, c]
    where p * stride_h = h + pad_h - r * dil_h, and q alike

With a stride, most pairs (h, r) meet no p. Pixels with the same h mod stride_h and the same w mod stride_w meet the
same taps, which are stride / gcd(stride, dilation) apart. So the pixels are sorted into stride_h * stride_w classes.
Within a class the sum is a correlation of stride 1 over dy: no work is spent on zeros, and all classes run in one
launch. A class that meets no tap writes zeros.

GEMM_M = N * H * W input pixels of a class, GEMM_N = C channels, GEMM_K = taps of the class * K, one GEMM a group.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..epilogue import Channels, Finish
from ..gradient_epilogue import (
    NO_EPILOGUE,
    NOTHING_BELOW,
    GradientEpilogue,
    GradientLayouts,
    take_columns,
)
from ..indexing import channel_offset, class_axis, has_nan, pixel_offset, unravel_npq
from ..layout import Laid, Strides, strides_nhwc
from ..operands import DgradOperands
from ..problem import ConvProblem, tap_step
from ..tiling import MAX_REGISTERS, Precision, TileConfig, cdiv, register_limit
from .gradient_tiles import GradientTile, store_dx
from .tiles import Rows, hide_steps, load_taps, multiply_accumulate, reaches, tap_bits, unravel_rsc

EXTENTS = ["N", "H", "W", "P", "Q"]
STRIDES = [f"{t}_stride_{d}" for t in ("dy", "dx") for d in "nhwc"]
# Columns that the careful loop sums at a time: the fewest that a product may have.
CAREFUL_N = tl.constexpr(16)


class DgradAlignments(NamedTuple):
    """The alignment of the tensors' strides in elements, for which the kernel is compiled."""

    dy: int
    w: int
    dx: int


class DgradForm(NamedTuple):
    """What else the kernel is compiled for. STEP_H, STEP_W: distance between taps that meet the same pixel. MISSES:
    some pixel has taps that lie outside dy. PRECISION: as multiply_accumulate has it.
    """

    STEP_H: int
    STEP_W: int
    MISSES: bool
    PRECISION: Precision


class DgradBlock(NamedTuple):
    """The extents of a tile: pixels, channels, and filters of a k-step."""

    M: int
    N: int
    K: int


class ClassTaps(NamedTuple):
    """Inside a kernel, the taps that a class of pixels meets, rows x columns of them, step_h and step_w apart.

    The first is (r0, s0).
    """

    r0: tl.tensor
    s0: tl.tensor
    rows: tl.tensor
    columns: tl.tensor
    step_h: tl.constexpr
    step_w: tl.constexpr


@triton.jit
@no_type_check
def load_filters(w_ptr, strides, taps, step, first_k, c, C, EVEN: tl.constexpr):
    """The weights that a k-step needs: [BLOCK_K, BLOCK_N], for channels `c` of which C exist.

    step: (tap row, tap column, k, k_ok) of unravel_rsc, the taps counted within the class. first_k: the first filter of
    the group. EVEN: all of `k` exist.
    """
    tap_r, tap_s, k, k_ok = step
    c_ok = (c < C)[None, :]
    r = (taps.r0 + tap_r * taps.step_h).to(tl.int64)
    s = (taps.s0 + tap_s * taps.step_w).to(tl.int64)
    rows = pixel_offset(first_k + k, r, s, strides)
    columns = w_ptr + channel_offset(c, strides.c)
    return tl.load(columns[None, :] + rows[:, None], mask=c_ok if EVEN else c_ok & k_ok[:, None], other=0.0)


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
@no_type_check
def conv_dgrad_kernel(
    dy_ptr, w_ptr, dx_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, words_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    slots_ptr, N, H, W, P, Q, C,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    w_stride_k, w_stride_r, w_stride_s, w_stride_c,
    dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    g: tl.constexpr, e: tl.constexpr, align: tl.constexpr, form: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One tile of dx, plus the bias of a transposed convolution if there is one, or what an epilogue makes of it. C are
    the channels of a group; `slots` [tiles of all classes, 1 or 2, C * groups].

    g: ConvGeometry, with the filters of a group; e: the epilogue's Finish, or None; align: DgradAlignments; form:
    DgradForm; block: DgradBlock. The epilogue's images have the strides of dx.
    """
    STEP_H: tl.constexpr = form.STEP_H
    STEP_W: tl.constexpr = form.STEP_W
    PRECISION: tl.constexpr = form.PRECISION
    ACC: tl.constexpr = tl.float64 if PRECISION == "fp64" else tl.float32
    BLOCK_M: tl.constexpr = block.M
    BLOCK_N: tl.constexpr = block.N
    BLOCK_K: tl.constexpr = block.K
    K: tl.constexpr = g.K
    MAX_R: tl.constexpr = (g.R + STEP_H - 1) // STEP_H  # taps of the class that meets most
    MAX_S: tl.constexpr = (g.S + STEP_W - 1) // STEP_W
    FLAT: tl.constexpr = K < BLOCK_K and MAX_R * MAX_S > 1
    EVEN: tl.constexpr = K % BLOCK_K == 0
    P_STEP: tl.constexpr = -(g.dil_h * STEP_H // g.stride_h)  # from the pixel of dy that a tap meets to the next tap's
    Q_STEP: tl.constexpr = -(g.dil_w * STEP_W // g.stride_w)

    # Channels vary fastest, then classes: programs that run together share their part of dy.
    tiles_c = tl.cdiv(C, BLOCK_N)
    tiles_m = tl.cdiv(N * tl.cdiv(H, g.stride_h) * tl.cdiv(W, g.stride_w), BLOCK_M)
    pid = tl.program_id(0)
    first_h = pid // tiles_c % g.stride_h
    first_w = pid // tiles_c // g.stride_h % g.stride_w
    tile_m = pid // tiles_c // (g.stride_h * g.stride_w) % tiles_m
    group = pid // tiles_c // (g.stride_h * g.stride_w) // tiles_m

    rows, r0, taps_r, p0 = class_axis(first_h, H, g.R, g.stride_h, g.pad_h, g.dil_h, STEP_H)
    cols, s0, taps_s, q0 = class_axis(first_w, W, g.S, g.stride_w, g.pad_w, g.dil_w, STEP_W)
    M = N * rows * cols
    n, i, j, row_ok = unravel_npq(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M, rows, cols)
    c = pid % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    h = first_h + i * g.stride_h
    w_pixel = first_w + j * g.stride_w

    p = p0 + i
    q = q0 + j
    taps = ClassTaps(r0, s0, taps_r, taps_s, STEP_H, STEP_W)
    dy_strides = Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, align.dy)
    w_strides = Strides(w_stride_k, w_stride_r, w_stride_s, w_stride_c, align.w)
    dx_strides = Strides(dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, align.dx)
    TOGETHER: tl.constexpr = g.stride_h * g.stride_w == 1 and BLOCK_M % 32 == 0
    of = None
    if e is not None:
        of_channels = Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr, None)
        images = residual_ptr, y_ptr, z_ptr
        tile = pid // tiles_c % (g.stride_h * g.stride_w * tiles_m)
        of = GradientTile(images, words_ptr, of_channels, slots_ptr, tile, tile_m * BLOCK_M, H, W, M, C * g.groups)
    pixels = dy_ptr + pixel_offset(n, p, q, dy_strides) + channel_offset(group * K, dy_stride_c)
    bits = None if FLAT or MAX_R * MAX_S > 31 else tap_bits(p, q, row_ok, P, Q, MAX_R, MAX_S, P_STEP, Q_STEP)
    dy_rows = Rows(pixels, p, q, row_ok, bits)

    careful_steps = taps_r * taps_s * ((K + BLOCK_K - 1) // BLOCK_K)
    steps = tl.cdiv(taps_r * taps_s * K, BLOCK_K) if FLAT else careful_steps
    if g.stride_h * g.stride_w > 1:
        steps = tl.where(tile_m * BLOCK_M < M, steps, 0)  # classes differ in size: a smaller one has fewer tiles
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(hide_steps(steps, M, BLOCK_M * BLOCK_N)):
        k = unravel_rsc(step, K, taps_r, taps_s, BLOCK_K, FLAT)
        dy = load_taps(dy_rows, k, P, Q, dy_strides, MAX_S, P_STEP, Q_STEP, FLAT, EVEN)
        w = load_filters(w_ptr, w_strides, taps, k, group * K, c, C, EVEN)
        acc = multiply_accumulate(dy, w, acc, PRECISION)

    # Where a tap misses dy, its zero stands for nothing and must not meet a weight that is infinite or NaN. Where it
    # did, a sum is NaN, which is seldom: then the tile is summed again, one tap a step, and pixels that the tap does
    # not reach keep what they had. This is done for a few columns at a time: each sum is there in two versions, and
    # more of them would take registers from the loop above.
    careful = False
    if form.MISSES:
        careful = has_nan(acc)
    if careful:
        for part_n in tl.range(BLOCK_N // CAREFUL_N, num_stages=1):
            columns = pid % tiles_c * BLOCK_N + part_n * CAREFUL_N + tl.arange(0, CAREFUL_N)
            part = tl.zeros((BLOCK_M, CAREFUL_N), ACC)
            for step in tl.range(careful_steps, num_stages=1):
                k = unravel_rsc(step, K, taps_r, taps_s, BLOCK_K, False)
                dy = load_taps(dy_rows, k, P, Q, dy_strides, MAX_S, P_STEP, Q_STEP, False, EVEN)
                w = load_filters(w_ptr, w_strides, taps, k, group * K, columns, C, EVEN)
                reached = reaches(dy_rows, k[0], k[1], P, Q, MAX_S, P_STEP, Q_STEP)
                part = tl.where(reached[:, None], multiply_accumulate(dy, w, part, PRECISION), part)
            column = group * C + columns
            store_dx(dx_ptr, bias_ptr, part, (n, h, w_pixel), row_ok, column, columns < C, dx_strides, of, e, TOGETHER)
    elif e is None:
        store_dx(dx_ptr, bias_ptr, acc, (n, h, w_pixel), row_ok, group * C + c, c < C, dx_strides, of, e, TOGETHER)
    else:
        # What an epilogue reads must not take more registers than the sums leave.
        PIECES: tl.constexpr = BLOCK_N // 32 if BLOCK_M * BLOCK_N >= 128 * 64 else 1
        WIDTH: tl.constexpr = BLOCK_N // PIECES
        for piece in tl.static_range(PIECES):
            c_piece = pid % tiles_c * BLOCK_N + piece * WIDTH + tl.arange(0, WIDTH)
            dz = take_columns(acc, piece, PIECES)
            at = group * C + c_piece
            store_dx(dx_ptr, bias_ptr, dz, (n, h, w_pixel), row_ok, at, c_piece < C, dx_strides, of, e, TOGETHER)


def plan_dgrad(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    dy: Laid,
    w: Laid,
    dx: Laid,
    below: GradientLayouts = NOTHING_BELOW,
    e: Finish | None = None,
) -> launch.Launch[DgradOperands]:
    """See `dgrad`. below: the layouts of what the epilogue reads; e: its Finish, None where there is none. Raises
    ValueError where one of these layouts is not that of dx.
    """
    g = problem
    grid = (tile_rows(g, tile) * cdiv(g.group_channels, tile.BLOCK_N) * g.groups,)
    dys, ws, dxs = strides_nhwc(dy), strides_nhwc(w), strides_nhwc(dx)
    for field, t in zip(below._fields, below, strict=True):
        if t is not None and strides_nhwc(t) != dxs:
            raise ValueError(f"{field} must have the strides of dx, {dx.stride()}, but has {t.stride()}")
    limit = register_limit(g, "dgrad", precision, tile)  # by 168 an epilogue of 64 sums a thread spills 8 to 32 bytes
    return launch.Launch(
        conv_dgrad_kernel, grid, g.N, g.H, g.W, g.P, g.Q, g.group_channels, *dys[:4], *ws[:4], *dxs[:4],
        tile=tile, g=g.geometry(K=g.group_filters), e=e, align=DgradAlignments(dys.align, ws.align, dxs.align),
        form=DgradForm(
            STEP_H=tap_step(g.stride_h, g.dil_h), STEP_W=tap_step(g.stride_w, g.dil_w),
            MISSES=g.taps_miss_h or g.taps_miss_w, PRECISION=precision,
        ),
        block=DgradBlock(tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        maxnreg=limit if e is None or limit is None else MAX_REGISTERS,
    )  # fmt: skip


def tile_rows(problem: ConvProblem, tile: TileConfig) -> int:
    """Tiles along the pixels, those of all classes, in one group: as many as slots have rows."""
    g = problem
    return cdiv(g.N * cdiv(g.H, g.stride_h) * cdiv(g.W, g.stride_w), tile.BLOCK_M) * g.parities


def dgrad(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    bias: torch.Tensor | None = None,
    epilogue: GradientEpilogue = NO_EPILOGUE,
    slots: torch.Tensor | None = None,
) -> None:
    """Writes every element of dx: the gradient of a convolution's input, to which `bias` is added, if given, and what
    `epilogue` makes of it; and the sums of each tile to `slots`, if given.

    Shapes: dy [N, K, P, Q], w [K, C / groups, R, S], dx [N, C, H, W], in any memory layout; bias [C]: then it is
    the result of a transposed convolution. The epilogue's images have the strides of dx. slots [tile_rows, 2 if the
    epilogue has y else 1, C], in the accumulator's dtype: of g, and of g * (y - mean). Raises ValueError where an image
    of the epilogue has other strides.
    """
    e = epilogue
    finish = e.compiled(dx.dtype) if slots is not None or e is not NO_EPILOGUE else None
    prepared = plan_dgrad(problem, tile, precision, dy, w, dx, e.layouts, finish)
    prepared(DgradOperands(dy, w, dx, bias, *e[:4], *e.norm[:4], slots))
