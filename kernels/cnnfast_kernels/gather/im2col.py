"""Convolution by explicit im2col: the matrix of patches is written to memory, and a GEMM multiplies it.

    columns[n, p, q, (r, s, c)] = x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c]

fprop is then a 1x1 convolution of the columns, R * S * C channels deep; wgrad is that convolution's wgrad; dgrad is its
dgrad followed by col2im, which adds up, for each input pixel, the columns that were copied from it. The columns are
made a piece at a time, so that the workspace stays within MAX_WORKSPACE bytes, or one row of one image (dgrad: one
channel).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import devices, launch, memory
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..epilogue import PLAIN, Epilogue
from ..indexing import channel_offset, pixel_offset, unravel_npq
from ..layout import Strides, strides_nhwc
from ..problem import ConvProblem
from ..slots import empty_slots, reduce_slots
from ..tiling import Precision, TileConfig, cdiv, choose_tile
from .dgrad import dgrad
from .fprop import fprop
from .wgrad import wgrad_slots

MAX_WORKSPACE = 256 * 2**20
COPY_TILE = TileConfig(BLOCK_M=32, BLOCK_N=64, BLOCK_K=1)

STRIDES = [f"x_stride_{d}" for d in "nhwc"]


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "P0", *STRIDES])
@no_type_check
def im2col_kernel(
    x_ptr, columns_ptr, N, H, W, P, Q, P0, x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    C: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of output rows P0 to P0 + P: [N, P, Q, GROUPS, R, S, C], C channels a group."""
    COLUMNS: tl.constexpr = R * S * C
    tiles_n = tl.cdiv(COLUMNS, BLOCK_N)
    pid = tl.program_id(0)
    M = N * P * Q
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = pid // tiles_n // tiles_m
    m = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q, row_ok = unravel_npq(m, M, P, Q)

    column = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = column % C
    r = column // C // S
    s = column // C % S
    h = ((P0 + p) * STRIDE_H - PAD_H)[:, None] + (r * DIL_H)[None, :]
    w = (q * STRIDE_W - PAD_W)[:, None] + (s * DIL_W)[None, :]
    stored = row_ok[:, None] & (column < COLUMNS)[None, :]
    inside = stored & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = x_ptr + pixel_offset(n[:, None], h, w, Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, X_ALIGN))
    values = tl.load(x + channel_offset(group * C + c, x_stride_c)[None, :], mask=inside, other=0.0)
    rows = columns_ptr + (m.to(tl.int64) * GROUPS + group) * COLUMNS
    tl.store(rows[:, None] + column[None, :], values, mask=stored)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "C0", *STRIDES])
@no_type_check
def col2im_kernel(
    columns_ptr, x_ptr, bias_ptr, N, H, W, P, Q, C0, x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    C: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums columns [N, P, Q, GROUPS, R, S, C] into channels C0 to C0 + C of each group of x, CHANNELS a group, plus the
    bias, if any.
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
    for tap in range(R * S):
        h_from = h + PAD_H - tap // S * DIL_H
        w_from = w + PAD_W - tap % S * DIL_W
        p = h_from // STRIDE_H
        q = w_from // STRIDE_W
        ok = (
            row_ok
            & (h_from >= 0)
            & (w_from >= 0)
            & (p < P)
            & (q < Q)
            & (h_from % STRIDE_H == 0)
            & (w_from % STRIDE_W == 0)
        )
        pixel = (n.to(tl.int64) * P + p) * Q + q
        rows = columns_ptr + ((pixel * GROUPS + group) * R * S + tap) * C
        acc += tl.load(rows[:, None] + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0).to(ACC)
    channel = group * CHANNELS + C0 + c
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + channel, mask=c_ok, other=0.0).to(ACC)[None, :]
    x = x_ptr + pixel_offset(n, h, w, Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, X_ALIGN))
    x = x[:, None] + channel_offset(channel, x_stride_c)[None, :]
    tl.store(x, acc.to(x_ptr.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])


def geometry(g: ConvProblem) -> dict[str, int]:
    """The constexpr arguments that both kernels read off the problem."""
    return {
        "GROUPS": g.groups, "R": g.R, "S": g.S, "STRIDE_H": g.stride_h, "STRIDE_W": g.stride_w, "PAD_H": g.pad_h, "PAD_W": g.pad_w,
        "DIL_H": g.dil_h, "DIL_W": g.dil_w, "BLOCK_M": COPY_TILE.BLOCK_M, "BLOCK_N": COPY_TILE.BLOCK_N,
    }  # fmt: skip


def copy_tiles(rows: int, columns: int, groups: int) -> tuple[int]:
    return (cdiv(rows, COPY_TILE.BLOCK_M) * cdiv(columns, COPY_TILE.BLOCK_N) * groups,)


def im2col(problem: ConvProblem, x: torch.Tensor, p0: int, p1: int) -> torch.Tensor:
    """Columns of output rows p0 to p1 of every image of x, as a channels_last tensor [N, groups * R * S * C, p1 - p0,
    Q].
    """
    g, n = problem, x.shape[0]
    depth = g.R * g.S * g.C
    columns = memory.empty((n, depth, p1 - p0, g.Q), x, torch.channels_last)
    xs = strides_nhwc(x)
    launch.run(
        im2col_kernel, copy_tiles(n * (p1 - p0) * g.Q, depth // g.groups, g.groups), x.device,
        x, columns, n, g.H, g.W, p1 - p0, g.Q, p0, *xs[:4], tile=COPY_TILE, C=g.group_channels, X_ALIGN=xs.align, **geometry(g),
    )  # fmt: skip
    return columns


def col2im(
    problem: ConvProblem, columns: torch.Tensor, dx: torch.Tensor, bias: torch.Tensor | None, c0: int, c1: int
) -> None:
    """Writes channels c0 to c1 of every group of dx from columns [N, groups * R * S * (c1 - c0), P, Q], channels_last."""
    g, n = problem, dx.shape[0]
    xs = strides_nhwc(dx)
    launch.run(
        col2im_kernel, copy_tiles(n * g.H * g.W, c1 - c0, g.groups), dx.device,
        columns, dx, bias, n, g.H, g.W, g.P, g.Q, c0, *xs[:4], tile=COPY_TILE, C=c1 - c0, CHANNELS=g.group_channels, X_ALIGN=xs.align,
        ACC=KERNEL_DTYPES[accumulator_dtype(dx.dtype)], **geometry(g),
    )  # fmt: skip


def pieces(problem: ConvProblem, element_size: int) -> Iterator[tuple[slice, int, int]]:
    """(images, p0, p1) that cover the output: several whole images if they fit the workspace, else rows of one image."""
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
    filters = flat_filters(w)
    for images, p0, p1 in pieces(problem, x.element_size()):
        columns = im2col(problem, x[images], p0, p1)
        gemm = as_1x1(problem, columns.shape[0], p1 - p0, columns.shape[1])
        residual = None if epilogue.residual is None else epilogue.residual[images, :, p0:p1]
        tile = choose_tile(gemm, "fprop", precision, arch=devices.architecture(x.device))
        part = y[images, :, p0:p1]
        # Rows of a contiguous image are no dense tensor of their own, and fprop writes nothing else.
        dense = part if y.stride(1) == 1 or p1 - p0 == problem.P else memory.empty(part.shape, y)
        fprop(gemm, tile, precision, columns, filters, dense, epilogue._replace(residual=residual))
        if dense is not part:
            part.copy_(dense)


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
            columns = memory.empty((gemm.N, gemm.C, g.P, g.Q), dy, torch.channels_last)
            dgrad(
                gemm,
                choose_tile(gemm, "dgrad", precision, arch=devices.architecture(dy.device)),
                precision,
                part,
                filters,
                columns,
            )
            col2im(g, columns, dx[n : n + images], bias, c0, c1)


def im2col_wgrad(
    problem: ConvProblem, precision: Precision, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor
) -> None:
    """As gather.wgrad.wgrad, by im2col: every piece leaves partial sums, which are added in the order of the pieces."""
    parts = list(pieces(problem, x.element_size()))
    first = as_1x1(problem, parts[0][0].stop, parts[0][2], problem.R * problem.S * problem.C)
    tile = choose_tile(first, "wgrad", precision, arch=devices.architecture(x.device))
    partials = empty_slots(problem, len(parts) * tile.SPLIT_K, x)
    flat = partials.permute(0, 1, 3, 4, 2).flatten(2)[..., None, None]  # the same memory in the order of the columns
    for i, (images, p0, p1) in enumerate(parts):
        columns = im2col(problem, x[images], p0, p1)
        gemm = as_1x1(problem, columns.shape[0], p1 - p0, columns.shape[1])
        wgrad_slots(
            gemm, tile, precision, columns, dy[images, :, p0:p1], flat[i * tile.SPLIT_K : (i + 1) * tile.SPLIT_K]
        )
    reduce_slots(partials, dw)
