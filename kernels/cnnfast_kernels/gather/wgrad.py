"""Gradient of a convolution's weights as an implicit GEMM.

    dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] * x[n, h, w, c]
    where h = p * stride_h - pad_h + r * dil_h, and w alike

GEMM_M = K filters, GEMM_N = R * S * C weights of a filter (c fastest), GEMM_K = N * P * Q output pixels, one GEMM a
group. The result is small and the sum long, so the pixels are cut into parts that run side by side. Each part writes a
gradient to its own slot, and a second kernel adds the slots in a fixed order: the same bits every time.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..indexing import channel_offset, divide, divisor, pixel_offset, within
from ..layout import Laid, Strides, is_packed, strides_nhwc
from ..operands import WgradOperands
from ..problem import ConvProblem
from ..slots import WgradLaunches, plan_slots
from ..tiling import Precision, TileConfig, cdiv, register_limit
from .tiles import multiply_accumulate

EXTENTS = ["N", "H", "W", "P", "Q", "SLOTS", "p_magic", "p_shift", "q_magic", "q_shift"]
STRIDES = [f"{t}_stride_{d}" for t in ("x", "dy") for d in "nhwc"]


class WgradMemory(NamedTuple):
    """How the tensors lie in memory, as far as the kernel is compiled for that: the alignment of their strides in
    elements, and of x and dy whether they are packed (layout.is_packed), as they are but for slices and NCHW. Then a
    pixel lies at its number times all channels, a constant, and strides are not read. same_pixels: x is packed and of
    dy's size, at stride 1: what a tap meets of pixel m lies as far from pixel m of x for all m.
    """

    x_align: int
    dy_align: int
    dw_align: int
    x_packed: bool
    dy_packed: bool
    same_pixels: bool

    @classmethod
    def of(cls, problem: ConvProblem, x: Laid, dy: Laid, dw_align: int) -> WgradMemory:
        g = problem
        # The kernel counts pixels in 32 bits, among them some as far outside of x as it is padded.
        packed = is_packed(x) and g.pad_h * g.W + g.pad_w < 2**31, is_packed(dy)
        # an alignment that nobody reads shall compile nothing
        x_align, dy_align = (1 if of else strides_nhwc(t).align for t, of in zip((x, dy), packed, strict=True))
        same = packed[0] and (g.stride_h, g.stride_w) == (1, 1) and (g.P, g.Q) == (g.H, g.W)
        return cls(x_align, dy_align, dw_align, *packed, same)


@triton.jit(do_not_specialize=EXTENTS + STRIDES)
@no_type_check
def conv_wgrad_kernel(
    x_ptr, dy_ptr, dw_ptr, N, H, W, P, Q, SLOTS, p_magic, p_shift, q_magic, q_shift,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    dw_stride_slot, dw_stride_k, dw_stride_r, dw_stride_s, dw_stride_c,
    g: tl.constexpr, memory: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one slot of dw [SLOTS, K * groups, C, R, S].

    g: ConvGeometry, with the channels and filters of a group; memory: WgradMemory. p_magic ... q_shift: of divisor(P)
    and divisor(Q).
    """
    C: tl.constexpr = g.C
    K: tl.constexpr = g.K
    COLUMNS: tl.constexpr = g.R * g.S * C
    ONE_TAP: tl.constexpr = C % BLOCK_N == 0 or g.R * g.S == 1  # no tile of columns spans two taps
    POINTWISE: tl.constexpr = memory.same_pixels and g.R * g.S == 1  # pixel m of dy meets pixel m of x
    X_PITCH: tl.constexpr = C * g.groups  # elements from one packed pixel to the next
    DY_PITCH: tl.constexpr = K * g.groups

    # Weights vary fastest: programs that run together share their pixels.
    M = N * P * Q
    tiles_rsc = tl.cdiv(COLUMNS, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_M)
    pid = tl.program_id(0)
    column = pid % tiles_rsc * BLOCK_N
    group = pid // tiles_rsc // tiles_k % g.groups
    slot = pid // tiles_rsc // tiles_k // g.groups

    k = pid // tiles_rsc % tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ok = k < K
    columns = column + tl.arange(0, BLOCK_N)
    column_ok = columns < COLUMNS
    c = columns % C
    tap = (column if ONE_TAP else columns) // C
    h_tap = tap // g.S * g.dil_h - g.pad_h  # scalars if ONE_TAP, else [BLOCK_N]
    w_tap = tap % g.S * g.dil_w - g.pad_w
    x_strides = Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, memory.x_align)
    dy_strides = Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, memory.dy_align)
    x_cols = x_ptr + channel_offset(group * C + c, x_stride_c)
    dy_cols = dy_ptr + channel_offset(group * K + k, dy_stride_c)
    if memory.x_packed:
        x_cols += (h_tap.to(tl.int64) * W + w_tap) * X_PITCH
    else:
        x_cols += pixel_offset(tl.zeros_like(h_tap), h_tap, w_tap, x_strides)

    image = H * W  # pixels of x from one image to the next, and from what a line of dy meets to the next line
    line = g.stride_h * W
    steps = tl.cdiv(tl.cdiv(M, BLOCK_K), SLOTS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(slot * steps, tl.minimum((slot + 1) * steps, tl.cdiv(M, BLOCK_K))):
        m = step * BLOCK_K + tl.arange(0, BLOCK_K)
        ok = m < M
        if not (POINTWISE and memory.dy_packed):
            t = divide(m, q_magic, q_shift)
            n = divide(t, p_magic, p_shift)
            p = t - n * P
            q = m - t * Q

        dy_rows = m.to(tl.int64) * DY_PITCH if memory.dy_packed else pixel_offset(n, p, q, dy_strides)
        dy_mask = ok[None, :] if K % BLOCK_M == 0 else ok[None, :] & k_ok[:, None]
        dy = tl.load(dy_cols[:, None] + dy_rows[None, :], mask=dy_mask, other=0.0)  # [BLOCK_M, BLOCK_K]

        if not POINTWISE:
            h = p * g.stride_h
            w = q * g.stride_w
        if memory.same_pixels:
            x_rows = m.to(tl.int64) * X_PITCH
        elif memory.x_packed:
            x_rows = (n * image + p * line + q * g.stride_w).to(tl.uint32).to(tl.int64) * X_PITCH
        else:
            x_rows = pixel_offset(n, h, w, x_strides)
        if POINTWISE:
            mask = ok[:, None]
        elif ONE_TAP:
            mask = (ok & within(h + h_tap, H) & within(w + w_tap, W))[:, None]
        else:
            inside_h = within(h[:, None] + h_tap[None, :], H)
            mask = ok[:, None] & inside_h & within(w[:, None] + w_tap[None, :], W)
        mask = mask if COLUMNS % BLOCK_N == 0 else mask & column_ok[None, :]
        x = tl.load(x_cols[None, :] + x_rows[:, None], mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = multiply_accumulate(dy, x, acc, PRECISION)

    tap = columns // C
    dw_rows = dw_ptr + slot.to(tl.int64) * dw_stride_slot + (group * K + k).to(tl.int64) * dw_stride_k * memory.dw_align
    dw_taps = ((tap // g.S).to(tl.int64) * dw_stride_r + (tap % g.S).to(tl.int64) * dw_stride_s) * memory.dw_align
    dw_cols = dw_taps + channel_offset(c, dw_stride_c)
    dw = acc.to(dw_ptr.dtype.element_ty)
    tl.store(dw_rows[:, None] + dw_cols[None, :], dw, mask=k_ok[:, None] & column_ok[None, :])


def plan_wgrad_slots(
    problem: ConvProblem,
    tile: TileConfig,
    precision: Precision,
    x: Laid,
    dy: Laid,
    slot: Laid,
    slots: int,
    slot_stride: int,
) -> launch.Launch[WgradOperands]:
    """Writes so many slots of dw, laid as `slot` is, slot_stride elements apart: slot i gets the gradient from the i-th
    part of the output pixels.

    Shapes: x [N, C, H, W], dy [N, K, P, Q], slot [K, C / groups, R, S], in any memory layout. There may be more slots
    than work: the last ones are then zeros. The sum is taken in the accumulator's dtype and rounded to that of the
    slots. `tile.SPLIT_K` is not read.
    """
    g = problem
    grid = (cdiv(g.group_filters, tile.BLOCK_M) * cdiv(g.R * g.S * g.group_channels, tile.BLOCK_N) * g.groups * slots,)
    xs, dys, dws = strides_nhwc(x), strides_nhwc(dy), strides_nhwc(slot)
    return launch.Launch(
        conv_wgrad_kernel, grid,
        g.N, g.H, g.W, g.P, g.Q, slots, *divisor(max(g.P, 1)), *divisor(max(g.Q, 1)),
        *xs[:4], *dys[:4], slot_stride, *dws[:4],
        tile=tile, g=g.geometry(C=g.group_channels, K=g.group_filters), memory=WgradMemory.of(g, x, dy, dws.align),
        PRECISION=precision, ACC=KERNEL_DTYPES[accumulator_dtype(x.dtype)],
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=register_limit(g, "wgrad", precision, tile),
    )  # fmt: skip


def plan_wgrad(
    problem: ConvProblem, tile: TileConfig, precision: Precision, x: Laid, dy: Laid, dw: Laid
) -> WgradLaunches:
    """See `wgrad`. dy must not be empty."""
    return plan_slots(problem, tile.SPLIT_K, dw, x.dtype, partial(plan_wgrad_slots, problem, tile, precision, x, dy))


def wgrad(
    problem: ConvProblem, tile: TileConfig, precision: Precision, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor
) -> None:
    """Writes every element of dw, the gradient of a convolution's weights, summed in tile.SPLIT_K slots.

    Shapes: x [N, C, H, W], dy [N, K, P, Q], dw [K, C / groups, R, S], in any memory layout.
    """
    if dy.numel() == 0:
        dw.zero_()
    else:
        plan_wgrad(problem, tile, precision, x, dy, dw)(WgradOperands(x, dy, dw))
