"""Convolution by explicit im2col: the matrix of patches is written to memory, and a GEMM multiplies it.

    columns[n, p, q, (r, s, c)] = x[n, h, w, c]    where h = p * stride_h - pad_h + r * dil_h, and w alike

fprop is then a 1x1 convolution of the columns, R * S * C channels deep; wgrad is that convolution's wgrad; dgrad is its
dgrad followed by col2im, which adds up, for each input pixel, the columns that were copied from it. The columns are
made a piece at a time, so that the workspace stays within MAX_WORKSPACE bytes, or one row of one image (dgrad: one
channel).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import devices, launch, memory
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..epilogue import PLAIN, Epilogue
from ..indexing import channel_offset, pixel_offset, unravel_npq
from ..layout import Layout, Strides, dense, layout_of, strides_nhwc
from ..operands import DgradOperands, FpropOperands, WgradOperands
from ..problem import ConvProblem
from ..slots import ReductionOperands, empty_slots, plan_reduction
from ..tiling import Precision, TileConfig, cdiv, choose_tile
from .dgrad import plan_dgrad
from .fprop import plan_fprop
from .wgrad import plan_wgrad_slots

MAX_WORKSPACE = 256 * 2**20
COPY_TILE = TileConfig(BLOCK_M=32, BLOCK_N=64, BLOCK_K=1)


class Im2colOperands(NamedTuple):
    """x [N, C, H, W] and the result, its columns [N, groups * R * S * C, P, Q], channels_last; C is of a group."""

    x: torch.Tensor
    columns: torch.Tensor


class Col2imOperands(NamedTuple):
    """columns, as above, and the result dx [N, C, H, W], to which bias [C] is added, if given."""

    columns: torch.Tensor
    dx: torch.Tensor
    bias: torch.Tensor | None = None


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "P0", *(f"x_stride_{d}" for d in "nhwc")])
@no_type_check
def im2col_kernel(
    x_ptr, columns_ptr, N, H, W, P, Q, P0, x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    g: tl.constexpr, X_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the columns of output rows P0 to P0 + P: [N, P, Q, groups, R, S, C].

    g: ConvGeometry, with the channels of a group.
    """
    C: tl.constexpr = g.C
    COLUMNS: tl.constexpr = g.R * g.S * C
    tiles_n = tl.cdiv(COLUMNS, BLOCK_N)
    pid = tl.program_id(0)
    M = N * P * Q
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = pid // tiles_n // tiles_m
    m = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q, row_ok = unravel_npq(m, M, P, Q)

    column = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = column % C
    r = column // C // g.S
    s = column // C % g.S
    h = ((P0 + p) * g.stride_h - g.pad_h)[:, None] + (r * g.dil_h)[None, :]
    w = (q * g.stride_w - g.pad_w)[:, None] + (s * g.dil_w)[None, :]
    stored = row_ok[:, None] & (column < COLUMNS)[None, :]
    inside = stored & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = x_ptr + pixel_offset(n[:, None], h, w, Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, X_ALIGN))
    values = tl.load(x + channel_offset(group * C + c, x_stride_c)[None, :], mask=inside, other=0.0)
    rows = columns_ptr + (m.to(tl.int64) * g.groups + group) * COLUMNS
    tl.store(rows[:, None] + column[None, :], values, mask=stored)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "C0", *(f"dx_stride_{d}" for d in "nhwc")])
@no_type_check
def col2im_kernel(
    columns_ptr, dx_ptr, bias_ptr, N, H, W, P, Q, C0, dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    g: tl.constexpr, C: tl.constexpr, DX_ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of channels C0 to C0 + C of each group of dx: sums of columns [N, P, Q, groups, R, S, C], plus the bias,
    if any.

    g: ConvGeometry, with all channels of a group.
    """
    tiles_n = tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0)
    M = N * H * W
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = pid // tiles_n // tiles_m
    n, h, w, row_ok = unravel_npq(pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M), M, H, W)
    c = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ok = c < C

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tap in range(g.R * g.S):
        h_from = h + g.pad_h - tap // g.S * g.dil_h
        w_from = w + g.pad_w - tap % g.S * g.dil_w
        p = h_from // g.stride_h
        q = w_from // g.stride_w
        ok = row_ok & (h_from >= 0) & (w_from >= 0) & (p < P) & (q < Q)
        ok = ok & (h_from % g.stride_h == 0) & (w_from % g.stride_w == 0)
        pixel = (n.to(tl.int64) * P + p) * Q + q
        rows = columns_ptr + ((pixel * g.groups + group) * g.R * g.S + tap) * C
        acc += tl.load(rows[:, None] + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0).to(ACC)
    channel = group * g.C + C0 + c
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + channel, mask=c_ok, other=0.0).to(ACC)[None, :]
    dx = dx_ptr + pixel_offset(n, h, w, Strides(dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, DX_ALIGN))
    dx = dx[:, None] + channel_offset(channel, dx_stride_c)[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])


def copy_tiles(rows: int, columns: int, groups: int) -> tuple[int]:
    return (cdiv(rows, COPY_TILE.BLOCK_M) * cdiv(columns, COPY_TILE.BLOCK_N) * groups,)


@launch.planned
def plan_im2col(problem: ConvProblem, x: Layout, p0: int, p1: int) -> tuple[Layout, launch.Launch[Im2colOperands]]:
    """The columns' layout, and the launch that writes them; see `im2col`."""
    g, n, xs = problem, x.shape[0], strides_nhwc(x)
    columns = dense((n, g.R * g.S * g.C, p1 - p0, g.Q), x.dtype, torch.channels_last)
    grid = copy_tiles(n * (p1 - p0) * g.Q, g.R * g.S * g.group_channels, g.groups)
    return columns, launch.Launch(
        im2col_kernel, grid, n, g.H, g.W, p1 - p0, g.Q, p0, *xs[:4],
        tile=COPY_TILE, g=g.geometry(C=g.group_channels), X_ALIGN=xs.align,
        BLOCK_M=COPY_TILE.BLOCK_M, BLOCK_N=COPY_TILE.BLOCK_N,
    )  # fmt: skip


def im2col(problem: ConvProblem, x: torch.Tensor, p0: int, p1: int) -> torch.Tensor:
    """Columns of output rows p0 to p1 of every image of x, as a channels_last tensor [N, groups * R * S * C, p1 - p0,
    Q].
    """
    layout, run = plan_im2col(problem, layout_of(x), p0, p1)
    columns = memory.empty(layout, x)
    run(Im2colOperands(x, columns))
    return columns


@launch.planned
def plan_col2im(problem: ConvProblem, dx: Layout, c0: int, c1: int) -> launch.Launch[Col2imOperands]:
    """See `col2im`."""
    g, n, dxs = problem, dx.shape[0], strides_nhwc(dx)
    return launch.Launch(
        col2im_kernel, copy_tiles(n * g.H * g.W, c1 - c0, g.groups), n, g.H, g.W, g.P, g.Q, c0, *dxs[:4],
        tile=COPY_TILE, g=g.geometry(C=g.group_channels), C=c1 - c0, DX_ALIGN=dxs.align,
        ACC=KERNEL_DTYPES[accumulator_dtype(dx.dtype)], BLOCK_M=COPY_TILE.BLOCK_M, BLOCK_N=COPY_TILE.BLOCK_N,
    )  # fmt: skip


def col2im(
    problem: ConvProblem, columns: torch.Tensor, dx: torch.Tensor, bias: torch.Tensor | None, c0: int, c1: int
) -> None:
    """Writes channels c0 to c1 of every group of dx, from columns [N, groups * R * S * (c1 - c0), P, Q] that are
    channels_last.
    """
    plan_col2im(problem, layout_of(dx), c0, c1)(Col2imOperands(columns, dx, bias))


# ----------------------------------------------------------------------------------------------------------------------
# Convolution in pieces. Those of one size share their launches, which later calls find again.

planned_fprop, planned_dgrad, planned_wgrad_slots, planned_reduction = map(
    launch.planned, (plan_fprop, plan_dgrad, plan_wgrad_slots, plan_reduction)
)


def pieces(problem: ConvProblem, element_size: int) -> Iterator[tuple[slice, int, int]]:
    """(images, p0, p1) that cover the output: as many whole images as fit the workspace, or else rows of one image."""
    g = problem
    row = g.Q * g.R * g.S * g.C * element_size
    rows = min(g.P, max(1, MAX_WORKSPACE // max(row, 1)))
    images = max(1, MAX_WORKSPACE // max(row * g.P, 1))
    for n in range(0, g.N, images):
        for p in range(0, g.P, rows):
            yield slice(n, min(n + images, g.N)), p, min(p + rows, g.P)


def as_1x1(problem: ConvProblem, n: int, p: int, channels: int) -> ConvProblem:
    """The convolution that is left once the patches lie in memory."""
    return ConvProblem(n, channels, p, problem.Q, problem.K, 1, 1, p, problem.Q, groups=problem.groups)


def flat_filters(w: torch.Tensor) -> torch.Tensor:
    """[K, C, R, S] as [K, R * S * C, 1, 1]: the order of the columns. A channels_last weight is not copied."""
    return w.permute(0, 2, 3, 1).reshape(w.shape[0], -1, 1, 1)


def im2col_fprop(
    problem: ConvProblem,
    precision: Precision,
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue = PLAIN,
) -> None:
    """As gather.fprop.fprop, by im2col."""
    bias, norm, residual, _, _, slopes = epilogue
    e = epilogue.compiled(x.dtype)
    filters = flat_filters(w)
    for images, p0, p1 in pieces(problem, x.element_size()):
        columns = im2col(problem, x[images], p0, p1)
        gemm = as_1x1(problem, columns.shape[0], p1 - p0, columns.shape[1])
        tile = choose_tile(gemm, "fprop", precision, arch=devices.architecture(x.device))
        part = y[images, :, p0:p1]
        # fprop writes dense tensors only. Some of the rows of a contiguous image are none: they are copied from one.
        written = part if y.stride(1) == 1 or p1 - p0 == problem.P else memory.empty(part.shape, y)
        added = None if residual is None else residual[images, :, p0:p1]
        plan = planned_fprop(
            gemm, tile, precision, layout_of(columns), layout_of(filters), layout_of(written),
            None if added is None else layout_of(added), e,
        )  # fmt: skip
        plan(FpropOperands(columns, filters, written, bias, *norm[:4], added, None, slopes))
        if written is not part:
            part.copy_(written)


def im2col_dgrad(
    problem: ConvProblem,
    precision: Precision,
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """As gather.dgrad.dgrad, by im2col: pieces are images, and channels where one image is too large."""
    g = problem
    channel = g.P * g.Q * g.R * g.S * g.groups * dy.element_size()
    channels = min(g.group_channels, max(1, MAX_WORKSPACE // max(channel, 1)))
    images = max(1, MAX_WORKSPACE // max(channel * g.group_channels, 1))
    for c0 in range(0, g.group_channels, channels):
        c1 = min(c0 + channels, g.group_channels)
        filters = flat_filters(w[:, c0:c1])
        for n in range(0, g.N, images):
            part = dy[n : n + images]
            gemm = as_1x1(g, part.shape[0], g.P, g.groups * filters.shape[1])
            tile = choose_tile(gemm, "dgrad", precision, arch=devices.architecture(dy.device))
            columns = memory.empty((gemm.N, gemm.C, g.P, g.Q), dy, torch.channels_last)
            plan = planned_dgrad(gemm, tile, precision, layout_of(part), layout_of(filters), layout_of(columns))
            plan(DgradOperands(part, filters, columns))
            col2im(g, columns, dx[n : n + images], bias, c0, c1)


def im2col_wgrad(
    problem: ConvProblem, precision: Precision, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor
) -> None:
    """As gather.wgrad.wgrad, by im2col: each piece has slots of its own, which are added in the order of the pieces."""
    parts = list(pieces(problem, x.element_size()))
    first = as_1x1(problem, parts[0][0].stop, parts[0][2], problem.R * problem.S * problem.C)
    tile = choose_tile(first, "wgrad", precision, arch=devices.architecture(x.device))
    slots = empty_slots(problem, len(parts) * tile.SPLIT_K, x)
    flat = slots.permute(0, 1, 3, 4, 2).flatten(2)[..., None, None]  # the same memory in the order of the columns
    for i, (images, p0, p1) in enumerate(parts):
        columns, part = im2col(problem, x[images], p0, p1), dy[images, :, p0:p1]
        gemm = as_1x1(problem, columns.shape[0], p1 - p0, columns.shape[1])
        mine = flat[i * tile.SPLIT_K : (i + 1) * tile.SPLIT_K]
        plan = planned_wgrad_slots(
            gemm, tile, precision, layout_of(columns), layout_of(part), layout_of(mine[0]), tile.SPLIT_K, mine.stride(0)
        )
        plan(WgradOperands(columns, part, mine))
    planned_reduction(slots.shape[0], slots.stride(0), layout_of(dw))(ReductionOperands(slots, dw))
