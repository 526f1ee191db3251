"""Gradient of a depthwise convolution's weights.

    dw[k, r, s] = sum over n, p, q of x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c]
                                      * dy[n, p, q, k]    where c = k // MULTIPLIER

A thread sums over its own pixels, for all taps of a small filter at once, or for one column of a larger one after
another: the pixels then stay in the first-level cache. A program adds its threads' sums. The strips of dy are cut into
parts that run side by side; each writes its gradient to a slot of its own, and a second kernel adds the slots in a
fixed order: the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

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
from .filters import filters_as_channels
from .strips import StripBlock, Strips, add_product, in_range, load_row, locate_strips, mask_row, zeros
from .tiles import StripTile, columns_at_once, taps_at_once

EXTENTS = ["N", "H", "W", "P", "Q", "SLOTS", "strips_per_column"]
DIVISORS = ["strips_magic", "strips_shift", "q_magic", "q_shift"]
STRIDES = [f"{t}_stride_{d}" for t in ("x", "dy") for d in "nhwc"]


class DepthwiseWgradMemory(NamedTuple):
    """How the tensors lie in memory, as far as the kernel is compiled for it: the alignment of their strides in
    elements.
    """

    x_align: int
    dy_align: int
    dw_align: int


class ImageChannels(NamedTuple):
    """Inside a kernel, some channels of a tensor [N, C, H, W]: pointers [1, BLOCK_C] to their first pixels."""

    pointers: tl.tensor
    H: tl.tensor
    W: tl.tensor
    strides: Strides


@triton.jit
@no_type_check
def sum_taps(
    acc, x_images, dy_images, strips, first, last, r0, s0, channels_ok,
    g: tl.constexpr, block: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Adds the products of tiles `first` to `last` of strips to `acc`, which has one accumulator for each of
    TAPS x COLUMNS weights, from (r0, s0) on.

    channels_ok: see `load_row`. RAGGED: some strips have fewer than ROWS rows.
    """
    ACC: tl.constexpr = acc[0].dtype
    ROWS: tl.constexpr = block.ROWS
    COLUMNS: tl.constexpr = block.COLUMNS
    TAPS: tl.constexpr = len(acc) // COLUMNS
    x_strides = x_images.strides
    x_row = x_strides.h.to(tl.int64) * x_strides.align
    x_column = x_strides.w.to(tl.int64) * x_strides.align
    dy_row = dy_images.strides.h.to(tl.int64) * dy_images.strides.align
    for tile in range(first, last):
        n, i, q, ok = locate_strips(tile, strips, block.BLOCK_M)
        p = i * ROWS
        h0 = p * g.stride_h - g.pad_h + r0 * g.dil_h
        w0 = q * g.stride_w - g.pad_w + s0 * g.dil_w
        dy_pixels = dy_images.pointers + pixel_offset(n, p, q, dy_images.strides)[:, None]
        x_pixels = x_images.pointers + pixel_offset(n, h0, w0, x_strides)[:, None]
        p = mask_row(p, ok)
        dy = ()
        for t in tl.static_range(ROWS):
            dy = dy + (load_row(dy_pixels + t * dy_row, p + t, dy_images.H, channels_ok, ACC),)
        for s in tl.static_range(COLUMNS):
            row = mask_row(h0, ok & in_range(w0 + s * g.dil_w, x_images.W))
            # the compiler drops the load of a row in which no pixel and tap meet
            for j in tl.static_range((ROWS - 1) * g.stride_h + (TAPS - 1) * g.dil_h + 1):
                x_rows = x_pixels + (j * x_row + s * g.dil_w * x_column)
                x = load_row(x_rows, row + j, x_images.H, channels_ok, ACC)
                for t in tl.static_range(ROWS):
                    for r in tl.static_range(TAPS):
                        if t * g.stride_h + r * g.dil_h == j:
                            # where dy has no such row, 0 * x would be NaN for an infinite x
                            factor = tl.where((p + t < dy_images.H)[:, None], x, 0.0) if RAGGED else x
                            acc = add_product(acc, r * COLUMNS + s, factor, dy[t])
    return acc


@triton.jit(do_not_specialize=EXTENTS + DIVISORS + STRIDES)
@no_type_check
def depthwise_wgrad_kernel(
    x_ptr, dy_ptr, dw_ptr, N, H, W, P, Q, SLOTS,
    strips_per_column, strips_magic, strips_shift, q_magic, q_shift,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    dw_stride_r, dw_stride_s, dw_stride_k,
    g: tl.constexpr, memory: tl.constexpr, block: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_C filters of one slot of dw [SLOTS, R, S, K].

    g: ConvGeometry of groups of one channel; memory: DepthwiseWgradMemory; block: StripBlock. RAGGED: some strips have
    fewer than ROWS rows.
    """
    MULTIPLIER: tl.constexpr = g.K  # filters of a channel
    K: tl.constexpr = g.groups * g.K
    R: tl.constexpr = g.R
    TAPS: tl.constexpr = block.TAPS
    BLOCK_C: tl.constexpr = block.BLOCK_C
    COLUMNS: tl.constexpr = block.COLUMNS
    TILES_K: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C  # vary fastest: programs that run together read whole pixels
    slot = tl.program_id(0) // TILES_K
    k = tl.program_id(0) % TILES_K * BLOCK_C + tl.arange(0, BLOCK_C)
    k_ok = k < K
    channels_ok = None if K % BLOCK_C == 0 else k_ok
    strips = Strips(N, strips_per_column, strips_magic, strips_shift, Q, q_magic, q_shift)
    tiles = tl.cdiv(N * strips_per_column * Q, block.BLOCK_M)
    part = tl.cdiv(tiles, SLOTS)
    first = slot * part
    last = tl.minimum(first + part, tiles)

    x_strides = Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, memory.x_align)
    x_images = ImageChannels(x_ptr + channel_offset(k // MULTIPLIER, x_stride_c)[None, :], H, W, x_strides)
    dy_strides = Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, memory.dy_align)
    dy_images = ImageChannels(dy_ptr + channel_offset(k, dy_stride_c)[None, :], P, Q, dy_strides)
    dw_row = dw_stride_r * memory.dw_align
    dw_column = dw_stride_s * memory.dw_align
    dw_taps = dw_ptr + slot.to(tl.int64) * (g.R * g.S * K) + channel_offset(k, dw_stride_k)
    for r0 in tl.static_range(0, R, TAPS):
        for s0 in range(0, g.S, COLUMNS):
            acc = zeros(min(TAPS, R - r0) * COLUMNS, block.BLOCK_M, BLOCK_C, ACC)
            acc = sum_taps(acc, x_images, dy_images, strips, first, last, r0, s0, channels_ok, g, block, RAGGED)
            for tap in tl.static_range(len(acc)):
                offset = (r0 + tap // COLUMNS) * dw_row + (s0 + tap % COLUMNS) * dw_column
                tl.store(dw_taps + offset, tl.sum(acc[tap], 0).to(dw_ptr.dtype.element_ty), mask=k_ok)


def plan_depthwise_wgrad(problem: ConvProblem, tile: StripTile, x: Laid, dy: Laid, dw: Laid) -> WgradLaunches:
    """See `depthwise_wgrad`. dy must not be empty."""
    g, slots = problem, tile.SPLIT_K
    gradient = slot = filters_as_channels(dw)
    workspace = None
    acc = accumulator_dtype(x.dtype)
    if slots > 1:
        slot = dense((1, g.K, g.R, g.S), acc, torch.channels_last)
        workspace = dense((slots, g.R, g.S, g.K), acc)
    xs, dys, dws = strides_nhwc(x), strides_nhwc(dy), strides_nhwc(slot)
    strips = cdiv(g.P, tile.ROWS)
    by_slots: launch.Launch[WgradOperands] = launch.Launch(
        depthwise_wgrad_kernel, (slots * cdiv(g.K, tile.BLOCK_C),),
        g.N, g.H, g.W, g.P, g.Q, slots,
        strips, *divisor(max(strips, 1)), *divisor(max(g.Q, 1)), *xs[:4], *dys[:4], *dws[1:4],
        tile=tile, g=g.geometry(C=1, K=g.group_filters),
        memory=DepthwiseWgradMemory(xs.align, dys.align, dws.align),
        block=StripBlock(tile.BLOCK_M, tile.BLOCK_C, tile.ROWS, taps_at_once(g.R), columns_at_once(g.R, g.S)),
        RAGGED=g.P % tile.ROWS > 0, ACC=KERNEL_DTYPES[acc],
        num_warps=tile.num_warps, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return WgradLaunches(by_slots, workspace, plan_reduction(slots, g.R * g.S * g.K, gradient))


def depthwise_wgrad(problem: ConvProblem, tile: StripTile, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor) -> None:
    """Writes every element of dw, the gradient of a depthwise convolution's weights, summed from tile.SPLIT_K slots.

    Shapes: x [N, C, H, W], dy [N, K, P, Q], dw [K, 1, R, S], in any memory layout.
    """
    if dy.numel() == 0:
        dw.zero_()
    else:
        plan_depthwise_wgrad(problem, tile, x, dy, dw)(WgradOperands(x, dy, dw))
