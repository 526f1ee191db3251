"""Gradient of a convolution's weights as an implicit GEMM whose operands come by tensor maps.

    dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] * x[n, h, w, c]
    where h = p * stride_h - pad_h + r * dil_h and w = q * stride_w - pad_w + s * dil_w

A program has one tap: a box of dy's pixels meets a box of x's, shifted by the tap, and their product [filters,
channels] is summed over boxes. Boxes that the tap moves into the padding are skipped. The boxes are cut into parts that
run side by side, and each part writes its sum to a slot of its own. A second kernel (slots.py) adds the slots in a
fixed order: the same bits every time.

What lies outside dy is zero, and is multiplied all the same. Where P is no multiple of a box's rows, or Q of its
columns, the last box meets pixels of x beyond those that its tap reaches: if one of them is infinite or NaN, the tap's
weights become NaN, though the tap does not reach it. A second sum without such pixels, as in dgrad.py, was tried: with
it in the kernel, ptxas waits after every wgmma of the first sum where boxes pass through registers.

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
from .boxes import load_box, load_column, load_phases
from .tiles import BoxTile, box_programs
from .views import flattened, map_column, map_image, phases_of

EXTENTS = ["N", "H", "W", "P", "Q", "SLOTS"]


@triton.jit
@no_type_check
def boxes_inside(offset, inputs, outputs, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Which boxes of TILE outputs meet the image along one axis: the first, and how many.

    Output p reads input p * STRIDE + offset.
    """
    begin = tl.cdiv(tl.maximum(-offset, 0), STRIDE)
    end = tl.minimum(outputs, tl.cdiv(tl.maximum(inputs - offset, 0), STRIDE))
    first = begin // TILE
    return first, tl.where(begin < end, tl.cdiv(end, TILE) - first, 0)


@triton.jit(do_not_specialize=EXTENTS)
@no_type_check
def tma_wgrad_kernel(
    x_map, dy_map, dw_ptr, N, H, W, P, Q, K, SLOTS, dw_stride_slot, dw_stride_k, dw_stride_r, dw_stride_s, dw_stride_c,
    g: tl.constexpr, box: tl.constexpr, phases: tl.constexpr, DW_ALIGN: tl.constexpr,
):  # fmt: skip
    """TILE_K filters x TILE_C channels of one tap of one slot of dw [SLOTS, K, C, R, S].

    g: ConvGeometry, with the channels; box: Box; phases: those of x, Phases. DW_ALIGN: alignment of dw's strides.
    """
    TILE_K: tl.constexpr = box.TILE_K
    TILE_C: tl.constexpr = box.TILE_C
    TILES_C: tl.constexpr = (g.C + TILE_C - 1) // TILE_C
    COLUMN: tl.constexpr = box.TILE_H * box.TILE_W == 1

    # Weights vary fastest: programs that run together share their pixels.
    tiles_k = tl.cdiv(K, TILE_K)
    pid = tl.program_id(0)
    c0 = pid % TILES_C * TILE_C
    tap = pid // TILES_C % (g.R * g.S)
    k0 = pid // TILES_C // (g.R * g.S) % tiles_k * TILE_K
    slot = pid // TILES_C // (g.R * g.S) // tiles_k

    h_tap = tap // g.S * g.dil_h - g.pad_h
    w_tap = tap % g.S * g.dil_w - g.pad_w
    first_h, boxes_h = boxes_inside(h_tap, H, P, g.stride_h, box.TILE_H)
    first_w, boxes_w = boxes_inside(w_tap, W, Q, g.stride_w, box.TILE_W)
    boxes = tl.cdiv(N, box.TILE_N) * boxes_h * boxes_w
    begin = slot * tl.cdiv(boxes, SLOTS)

    acc = tl.zeros((TILE_K, TILE_C), tl.float32)
    for step in range(begin, tl.minimum(begin + tl.cdiv(boxes, SLOTS), boxes)):
        n = step // boxes_w // boxes_h * box.TILE_N
        p = (first_h + step // boxes_w % boxes_h) * box.TILE_H
        q = (first_w + step % boxes_w) * box.TILE_W
        dy = load_column(dy_map, n, p, q, k0) if COLUMN else load_box(dy_map, n, p, q, k0)  # [pixels, TILE_K]
        x = load_phases(x_map, n, p * g.stride_h + h_tap, q * g.stride_w + w_tap, c0, phases)  # [pixels, TILE_C]
        acc = tl.dot(dy.T, x, acc)

    k = k0 + tl.arange(0, TILE_K)
    c = c0 + tl.arange(0, TILE_C)
    # A row of the block is one filter; slot and tap are the same for all rows, so their offset is a scalar.
    dw_first = (
        slot.to(tl.int64) * dw_stride_slot
        + ((tap // g.S).to(tl.int64) * dw_stride_r + (tap % g.S).to(tl.int64) * dw_stride_s) * DW_ALIGN
    )
    dw_rows = dw_ptr + dw_first + k.to(tl.int64) * dw_stride_k * DW_ALIGN
    dw_cols = channel_offset(c, dw_stride_c)
    tl.store(
        dw_rows[:, None] + dw_cols[None, :], acc.to(dw_ptr.dtype.element_ty), mask=(k < K)[:, None] & (c < g.C)[None, :]
    )


def plan_slot_gradients(
    problem: ConvProblem, tile: BoxTile, x: Laid, dy: Laid, slot: Laid, slots: int, stride: int
) -> launch.Launch[WgradOperands]:
    """The launch that leaves `slots` gradients, of which each is laid out as `slot` is, `stride` elements apart."""
    g, (x, dy) = flattened(problem, x, dy)
    box, phases = tile.box, phases_of(g, "wgrad", tile, x)
    pixels, dws = box[:3], strides_nhwc(slot)
    map_dy = map_column if tile.TILE_H * tile.TILE_W == 1 else map_image
    return launch.Launch(
        tma_wgrad_kernel, (box_programs(g, "wgrad", tile),), g.N, g.H, g.W, g.P, g.Q, g.K, slots, stride, *dws[:4],
        tile=tile, maps={0: map_image(x, pixels, tile.TILE_C, phases), 1: map_dy(dy, pixels, tile.TILE_K)},
        g=g.geometry(C=g.C), box=box, phases=phases, DW_ALIGN=dws.align,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def plan_tma_wgrad(problem: ConvProblem, tile: BoxTile, x: Laid, dy: Laid, dw: Laid) -> WgradLaunches:
    """The launches of `tma_wgrad` but for their tensors."""
    return plan_slots(problem, tile.SPLIT_K, dw, x.dtype, partial(plan_slot_gradients, problem, tile, x, dy))


def tma_wgrad(problem: ConvProblem, tile: BoxTile, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor) -> None:
    """Writes every element of dw, the gradient of a convolution's weights, as the sum of tile.SPLIT_K slots.

    Shapes: x [N, C, H, W], dy [N, K, P, Q], of one dtype, float16 or bfloat16, and laid out as `views.why_not` demands;
    dw [K, C, R, S] in any memory layout. Raises ValueError where the tile's boxes cannot step with the problem's
    stride.
    """
    plan_tma_wgrad(problem, tile, x, dy, dw)(WgradOperands(x, dy, dw))
