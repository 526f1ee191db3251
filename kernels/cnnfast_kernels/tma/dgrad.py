"""Gradient of a convolution's input as an implicit GEMM whose operands all come by tensor maps.

    dx[n, h, w, c] = sum over r, s, k of dy[n, p, q, k] * w[k, r, s, c]    where p * stride_h = h + pad_h - r * dil_h, q alike

As in gather/dgrad.py, input pixels with the same h mod stride_h and w mod stride_w make up a class: they meet the same
taps, a stride / gcd(stride, dilation) apart, and within a class the sum is a correlation of stride 1 over dy. A box is
of one class: boxes of dy need no phases, dx is stored through them (see boxes.py). The GEMM is swapped, accumulator
[channels, pixels] = w transposed [C, filters] times the transposed box of dy [pixels, filters]: the weights are read as
they lie, no flipped copy is made.

Written for sm_90 and later. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..indexing import class_axis, has_nan
from ..layout import Laid
from ..operands import DgradOperands
from ..problem import ConvProblem, tap_step
from ..tiling import MAX_REGISTERS, cdiv
from .boxes import load_box, locate_box, pixels_inside, store_phases, take_part, taps_inside
from .tiles import BoxTile, box_count, box_grid, phases_of
from .views import flattened, map_filters, map_image, strides_of

EXTENTS = ["H", "W", "P", "Q", "rows", "columns"]
# Elements that the careful loop sums at a time. Each is there in two versions, beside a box of results. The registers
# cost no program its place: a multiprocessor has shared memory for fewer programs.
CAREFUL_SUMS = tl.constexpr(2048)


@triton.jit
@no_type_check
def locate_step(
    step, p0, q0, r0, s0, tap_r0, tap_s0, taps_s, STEP_H: tl.constexpr, STEP_W: tl.constexpr, P_STEP: tl.constexpr, Q_STEP: tl.constexpr,
    TILE_K: tl.constexpr, STEPS_K: tl.constexpr,
):  # fmt: skip
    """Of one step of the sum: the row and the column of dy where its box begins, the tap (r, s), the first filter."""
    tap_r = tap_r0 + step // STEPS_K // taps_s
    tap_s = tap_s0 + step // STEPS_K % taps_s
    return p0 + tap_r * P_STEP, q0 + tap_s * Q_STEP, r0 + tap_r * STEP_H, s0 + tap_s * STEP_W, step % STEPS_K * TILE_K


@triton.jit
@no_type_check
def add_bias(bias_ptr, dx, c0, C, TILE_C: tl.constexpr):
    """dx [pixels, TILE_C] plus the bias of channels from c0 on, if there is one."""
    if bias_ptr is not None:
        c = c0 + tl.arange(0, TILE_C)
        dx = dx + tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return dx


@triton.jit(do_not_specialize=EXTENTS)
@no_type_check
def tma_dgrad_kernel(
    dy_map, w_map, dx_map, bias_ptr, H, W, P, Q, rows, columns, C,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PIXEL: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, PHASE_H: tl.constexpr, PHASE_W: tl.constexpr, MISSES: tl.constexpr,
    TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE_K: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """One box of one class of dx, TILE_C channels of it, plus the bias of a transposed convolution if there is one.

    rows x columns: pixels of the largest class. PIXEL: elements from a pixel of dx to the next. MISSES: a tap that
    reaches one pixel of a box may lie outside dy for another.
    """
    PIXELS: tl.constexpr = TILE_N * TILE_H * TILE_W
    STEPS_K: tl.constexpr = (K + TILE_K - 1) // TILE_K
    P_STEP: tl.constexpr = -(DIL_H * STEP_H // STRIDE_H)
    Q_STEP: tl.constexpr = -(DIL_W * STEP_W // STRIDE_W)

    # Channels vary fastest, then classes: programs that run together share their part of dy.
    tiles_c = tl.cdiv(C, TILE_C)
    pid = tl.program_id(0)
    c0 = pid % tiles_c * TILE_C
    first_h = pid // tiles_c % STRIDE_H
    first_w = pid // tiles_c // STRIDE_H % STRIDE_W
    n0, i0, j0 = locate_box(pid // tiles_c // (STRIDE_H * STRIDE_W), rows, columns, TILE_N, TILE_H, TILE_W)

    _, r0, taps_r, p0 = class_axis(first_h, H, R, STRIDE_H, PAD_H, DIL_H, STEP_H)
    _, s0, taps_s, q0 = class_axis(first_w, W, S, STRIDE_W, PAD_W, DIL_W, STEP_W)
    p0 += i0
    q0 += j0
    tap_r0, taps_r = taps_inside(p0, P, taps_r, P_STEP, TILE_H)
    tap_s0, taps_s = taps_inside(q0, Q, taps_s, Q_STEP, TILE_W)

    h = first_h + i0 * STRIDE_H
    w_pixel = first_w + j0 * STRIDE_W
    steps = taps_r * taps_s * STEPS_K
    acc = tl.zeros((TILE_C, PIXELS), tl.float32)
    for step in range(steps):
        p, q, r, s, k = locate_step(
            step, p0, q0, r0, s0, tap_r0, tap_s0, taps_s, STEP_H, STEP_W, P_STEP, Q_STEP, TILE_K, STEPS_K
        )
        dy = load_box(dy_map, n0, p, q, k)  # [pixels, TILE_K]
        w = w_map.load([r, s, k, c0]).reshape(TILE_K, TILE_C)
        acc = tl.dot(w.T, dy.T, acc)

    # Where a tap misses dy, the zeros that fill a box stand for nothing and must not meet a weight that is infinite or
    # NaN. Where they did, a sum is NaN, which is seldom: then the box is summed again, and pixels that a step's tap
    # does not reach keep what they had. This is done for some pixels at a time, cut out of the boxes: the registers do
    # not hold two versions of all sums.
    careful = False
    if MISSES:
        careful = has_nan(acc)
    if careful:
        PART: tl.constexpr = min(PIXELS, CAREFUL_SUMS // TILE_C)
        part = tl.arange(0, PIXELS // PART)[:, None, None]
        parts = tl.zeros((PIXELS // PART, PART, TILE_C), dx_map.dtype)
        for i in tl.range(PIXELS // PART, num_stages=1):
            m = i * PART + tl.arange(0, PART)
            sums = tl.zeros((TILE_C, PART), tl.float32)
            for step in tl.range(steps, num_stages=1):
                p, q, r, s, k = locate_step(
                    step, p0, q0, r0, s0, tap_r0, tap_s0, taps_s, STEP_H, STEP_W, P_STEP, Q_STEP, TILE_K, STEPS_K
                )
                dy = take_part(load_box(dy_map, n0, p, q, k), i, PIXELS // PART)
                w = w_map.load([r, s, k, c0]).reshape(TILE_K, TILE_C)
                reached = pixels_inside(m, p, q, P, Q, TILE_H, TILE_W)
                sums = tl.where(reached[None, :], tl.dot(w.T, dy.T, sums), sums)
            parts = tl.where(part == i, add_bias(bias_ptr, sums.T, c0, C, TILE_C).to(dx_map.dtype)[None], parts)
        store_phases(dx_map, n0, h, w_pixel, c0, parts.reshape(PIXELS, TILE_C), PIXEL, PHASE_H, PHASE_W)
    else:
        dx = add_bias(bias_ptr, acc.T, c0, C, TILE_C).to(dx_map.dtype)
        store_phases(dx_map, n0, h, w_pixel, c0, dx, PIXEL, PHASE_H, PHASE_W)


def plan_tma_dgrad(problem: ConvProblem, tile: BoxTile, dy: Laid, w: Laid, dx: Laid) -> launch.Launch:
    """Takes (dy, w, dx, bias); see `tma_dgrad`."""
    g, (dy, dx) = flattened(problem, dy, dx)
    phases = phases_of(g, "dgrad", tile)
    box = tile.TILE_N, tile.TILE_H, tile.TILE_W
    maps = {
        0: map_image(dy, box, tile.TILE_K),
        1: map_filters(w, tile.TILE_K, tile.TILE_C),
        2: map_image(dx, box, tile.TILE_C, phases),
    }
    return launch.Launch(
        tma_dgrad_kernel, (box_count(g, "dgrad", tile) * g.parities * cdiv(g.C, tile.TILE_C),),
        g.H, g.W, g.P, g.Q, *box_grid(g, "dgrad"), g.C,
        tile=tile, maps=maps, K=g.K, R=g.R, S=g.S, PIXEL=strides_of(dx)[2],
        STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w, DIL_H=g.dil_h, DIL_W=g.dil_w,
        STEP_H=tap_step(g.stride_h, g.dil_h), STEP_W=tap_step(g.stride_w, g.dil_w), PHASE_H=phases[0], PHASE_W=phases[1],
        MISSES=(tile.TILE_H > 1 and g.taps_miss_h) or (tile.TILE_W > 1 and g.taps_miss_w),
        TILE_N=tile.TILE_N, TILE_H=tile.TILE_H, TILE_W=tile.TILE_W, TILE_K=tile.TILE_K, TILE_C=tile.TILE_C,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def tma_dgrad(
    problem: ConvProblem,
    tile: BoxTile,
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Writes every element of dx, the gradient of a convolution's input, or with `bias` the result of a transposed
    convolution.

    Shapes: dy [N, K, P, Q], w [K, C, R, S], dx [N, C, H, W], all of one dtype, float16 or bfloat16, and as
    `views.why_not` demands; bias [C]. Raises ValueError where the tile's boxes cannot step with the problem's stride.
    """
    plan_tma_dgrad(problem, tile, dy, w, dx)(DgradOperands(dy, w, dx, bias))
