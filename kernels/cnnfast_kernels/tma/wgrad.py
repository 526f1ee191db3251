"""Gradient of a convolution's weights as an implicit GEMM whose operands come by tensor maps.

    dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] * x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c]

A program has one tap: a box of dy's pixels meets a box of x's, shifted by the tap, and the product [filters, channels]
is summed over boxes. Those that the tap moves into the padding are skipped. The boxes are cut into parts that run side
by side; each writes a partial gradient to its own slot, and a second kernel adds the slots in a fixed order: the same
bits every time.

What lies outside dy is zero, and multiplied. Where P is no multiple of a box's rows, or Q of its columns, the last box
meets pixels of x beyond those that its tap reaches: an infinity or NaN there makes the tap's weights NaN though it does
not reach them. A second sum without such pixels, as in dgrad.py, was tried: beside it ptxas waits after every wgmma of
the first one, in boxes that pass through registers.

Written for sm_90 and later. Not yet run on a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..indexing import channel_offset
from ..layout import Laid, strides_nhwc
from ..operands import WgradOperands
from ..problem import ConvProblem
from ..slots import WgradLaunches, plan_slots
from ..tiling import cdiv
from .boxes import load_box, load_column, load_phases
from .tiles import BoxTile, phases_of
from .views import flattened, map_column, map_image, strides_of

EXTENTS = ["N", "H", "W", "P", "Q", "SLOTS"]


@triton.jit
@no_type_check
def boxes_inside(offset, inputs, outputs, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """The first box of TILE outputs that meets the image, and how many do: output p reads input p * STRIDE + offset."""
    begin = tl.cdiv(tl.maximum(-offset, 0), STRIDE)
    end = tl.minimum(outputs, tl.cdiv(tl.maximum(inputs - offset, 0), STRIDE))
    first = begin // TILE
    return first, tl.where(begin < end, tl.cdiv(end, TILE) - first, 0)


@triton.jit(do_not_specialize=EXTENTS)
@no_type_check
def tma_wgrad_kernel(
    x_map, dy_map, dw_ptr, N, H, W, P, Q, K, SLOTS, dw_stride_slot, dw_stride_k, dw_stride_r, dw_stride_s, dw_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PIXEL: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PHASE_H: tl.constexpr, PHASE_W: tl.constexpr, DW_ALIGN: tl.constexpr,
    TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE_K: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """TILE_K filters x TILE_C channels of one tap of one slot of dw [SLOTS, K, C, R, S]. PIXEL: elements from a pixel
    of x to the next.
    """
    TILES_C: tl.constexpr = (C + TILE_C - 1) // TILE_C
    COLUMN: tl.constexpr = TILE_H * TILE_W == 1

    # Weights vary fastest: programs that run together share their pixels.
    tiles_k = tl.cdiv(K, TILE_K)
    pid = tl.program_id(0)
    c0 = pid % TILES_C * TILE_C
    tap = pid // TILES_C % (R * S)
    k0 = pid // TILES_C // (R * S) % tiles_k * TILE_K
    slot = pid // TILES_C // (R * S) // tiles_k

    h_tap = tap // S * DIL_H - PAD_H
    w_tap = tap % S * DIL_W - PAD_W
    first_h, boxes_h = boxes_inside(h_tap, H, P, STRIDE_H, TILE_H)
    first_w, boxes_w = boxes_inside(w_tap, W, Q, STRIDE_W, TILE_W)
    boxes = tl.cdiv(N, TILE_N) * boxes_h * boxes_w
    begin = slot * tl.cdiv(boxes, SLOTS)

    acc = tl.zeros((TILE_K, TILE_C), tl.float32)
    for box in range(begin, tl.minimum(begin + tl.cdiv(boxes, SLOTS), boxes)):
        n = box // boxes_w // boxes_h * TILE_N
        p = (first_h + box // boxes_w % boxes_h) * TILE_H
        q = (first_w + box % boxes_w) * TILE_W
        dy = load_column(dy_map, n, p, q, k0) if COLUMN else load_box(dy_map, n, p, q, k0)  # [pixels, TILE_K]
        # [pixels, TILE_C]
        x = load_phases(x_map, n, p * STRIDE_H + h_tap, q * STRIDE_W + w_tap, c0, PIXEL, PHASE_H, PHASE_W)
        acc = tl.dot(dy.T, x, acc)

    k = k0 + tl.arange(0, TILE_K)
    c = c0 + tl.arange(0, TILE_C)
    dw_tap = (
        slot.to(tl.int64) * dw_stride_slot
        + ((tap // S).to(tl.int64) * dw_stride_r + (tap % S).to(tl.int64) * dw_stride_s) * DW_ALIGN
    )
    dw_rows = dw_ptr + dw_tap + k.to(tl.int64) * dw_stride_k * DW_ALIGN
    dw_cols = channel_offset(c, dw_stride_c)
    tl.store(
        dw_rows[:, None] + dw_cols[None, :], acc.to(dw_ptr.dtype.element_ty), mask=(k < K)[:, None] & (c < C)[None, :]
    )


def plan_partials(
    problem: ConvProblem, tile: BoxTile, x: Laid, dy: Laid, slot: Laid, slots: int, stride: int
) -> launch.Launch:
    """Takes (x, dy, partials): `slots` gradients laid as `slot` is, `stride` elements apart."""
    g, (x, dy) = flattened(problem, x, dy)
    phases = phases_of(g, "wgrad", tile)
    box, dws = (tile.TILE_N, tile.TILE_H, tile.TILE_W), strides_nhwc(slot)
    map_dy = map_column if tile.TILE_H * tile.TILE_W == 1 else map_image
    return launch.Launch(
        tma_wgrad_kernel, (g.R * g.S * cdiv(g.K, tile.TILE_K) * cdiv(g.C, tile.TILE_C) * slots,),
        g.N, g.H, g.W, g.P, g.Q, g.K, slots, stride, *dws[:4],
        tile=tile, maps={0: map_image(x, box, tile.TILE_C, phases), 1: map_dy(dy, box, tile.TILE_K)},
        C=g.C, R=g.R, S=g.S, PIXEL=strides_of(x)[2],
        STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w, DIL_H=g.dil_h, DIL_W=g.dil_w,
        PHASE_H=phases[0], PHASE_W=phases[1], DW_ALIGN=dws.align,
        TILE_N=tile.TILE_N, TILE_H=tile.TILE_H, TILE_W=tile.TILE_W, TILE_K=tile.TILE_K, TILE_C=tile.TILE_C,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def plan_tma_wgrad(problem: ConvProblem, tile: BoxTile, x: Laid, dy: Laid, dw: Laid) -> WgradLaunches:
    """Takes (x, dy, dw); see `tma_wgrad`."""
    return plan_slots(problem, tile.SPLIT_K, dw, x.dtype, partial(plan_partials, problem, tile, x, dy))


def tma_wgrad(problem: ConvProblem, tile: BoxTile, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor) -> None:
    """Writes every element of dw, the gradient of a convolution's weights, from tile.SPLIT_K partial sums.

    Shapes: x [N, C, H, W], dy [N, K, P, Q], of one dtype, float16 or bfloat16, and as `views.why_not` demands; dw [K,
    C, R, S] in any memory layout. Raises ValueError where the tile's boxes cannot step with the problem's stride.
    """
    plan_tma_wgrad(problem, tile, x, dy, dw)(WgradOperands(x, dy, dw))
