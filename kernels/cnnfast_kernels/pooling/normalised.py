"""Max pooling of what a batch norm and an activation make of a tensor, in one pass.

    z = max_pool(act((y - mean) * scale + beta)),  scale = gamma / sqrt(var + eps)

What is pooled is never written. Each maximum leaves its tap and y at it, from which normalised_gradients.py computes
the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..activations import activate
from ..epilogue import Channels, finish_of, load_channels
from ..indexing import channel_offset, pixel_offset, unravel_npq
from ..layout import Layout, Strides, dense, is_channels_last, result_format, strides_nhwc
from ..planes import PlaneTile, contiguous
from ..problem import PoolProblem
from ..tiling import BUSY_PROGRAMS, MAX_REGISTERS, cdiv
from .maximum import first_tap, taps_dtype
from .rows import MAX_UNROLL, PART_UNROLL, step_offset

SIZES = ["N", "H", "W", "P", "Q"]


class NormalisedPoolOperands(NamedTuple):
    """y [N, C, H, W]; mean, var, gamma and beta [C], contiguous, of which the last two may be absent; and the results
    [N, C, P, Q], laid alike: z, the tap of each maximum and y at it.
    """

    y: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    z: torch.Tensor
    taps: torch.Tensor
    at_max: torch.Tensor


@triton.jit
@no_type_check
def locate_pixels(M, H, W, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's pixels of [N, C, H, W], M = N * H * W: n, h, w and which exist, [BLOCK_M]; its channels and which
    exist, [BLOCK_C].
    """
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    n, h, w, ok = unravel_npq(m, M, H, W)
    return n, h, w, ok, c, c < C


@triton.jit
@no_type_check
def tile_offset(n, h, w, c, strides):
    """Elements from the start of a tensor of these layout.Strides to a tile of pixels and channels."""
    return pixel_offset(n, h, w, strides)[:, None] + channel_offset(c, strides.c)[None, :]


@triton.jit
@no_type_check
def comparable(u, STORED: tl.constexpr):
    """u rounded to the dtype STORED, in a dtype that compares as it.

    bfloat16 is widened by its bits, for which it has 16 more, and float16 not at all: where a number is rounded and
    widened again, LLVM takes the one for the inverse of the other and does neither.
    """
    if STORED == tl.bfloat16:
        bits = u.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return u.to(STORED)


@triton.jit(do_not_specialize=[*SIZES, *(f"{t}_stride_{d}" for t in "yz" for d in "nhwc")])
@no_type_check
def normalised_max_pool_kernel(
    y_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, z_ptr, taps_ptr, at_max_ptr, N, H, W, P, Q,
    y_stride_n, y_stride_h, y_stride_w, y_stride_c, z_stride_n, z_stride_h, z_stride_w, z_stride_c,
    g: tl.constexpr, e: tl.constexpr, Y_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of z, of the taps and of y at them. The first of equal values wins, the last NaN wins: PyTorch's rule for
    what the norm and the activation would have stored. g: PoolGeometry, not dilated; e: Finish.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    STORED: tl.constexpr = y_ptr.dtype.element_ty
    ACTIVATION: tl.constexpr = e.activation
    n, p, q, ok, c, c_ok = locate_pixels(N * P * Q, P, Q, g.C, BLOCK_M, BLOCK_C)
    channels = load_channels(Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr, None), c, c_ok, e)
    slope = tl.full((), e.slope, ACC)
    h0 = p * g.stride_h - g.pad_h
    w0 = q * g.stride_w - g.pad_w
    y_strides = Strides(y_stride_n, y_stride_h, y_stride_w, y_stride_c, Y_ALIGN)
    y_rows = y_ptr + tile_offset(n, h0, w0, c, y_strides)

    # A tap beyond the image stands for the nearest one inside, which has its turn too: masks would cost more. The first
    # is the maximum until a greater one comes: relu's results are never less than 0, and nothing is computed of those.
    LEAST: tl.constexpr = 0.0 if ACTIVATION == "relu" or ACTIVATION == "relu6" else float("-inf")
    best = comparable(tl.full((BLOCK_M, BLOCK_C), LEAST, ACC), STORED)
    first_r = first_tap(h0, 1)
    first_s = first_tap(w0, 1)
    mask = ok[:, None] & c_ok[None, :]
    at_max = tl.load(y_rows + step_offset(first_r, first_s, y_strides)[:, None], mask=mask, other=0.0).to(ACC)
    best_tap = (first_r * g.S + first_s)[:, None] + tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for tap in tl.range(g.R * g.S, loop_unroll_factor=UNROLL):
        r = tl.minimum(tl.maximum(first_r, tap // g.S), H - 1 - h0)
        s = tl.minimum(tl.maximum(first_s, tap % g.S), W - 1 - w0)
        y = tl.load(y_rows + step_offset(r, s, y_strides)[:, None], mask=mask, other=0.0).to(ACC)
        u = (y - channels[0][None, :]) * channels[1][None, :]
        if beta_ptr is not None:
            u = u + channels[2][None, :]
        if ACTIVATION == "relu6":
            u = tl.where(u > 6, 6.0, u)
        elif ACTIVATION != "relu":
            u = activate(u, slope, ACTIVATION)
        z = comparable(u, STORED)
        take = (z > best) | (z != z)
        best = tl.where(take, z, best)
        best_tap = tl.where(take, (r * g.S + s)[:, None], best_tap)
        at_max = tl.where(take, y, at_max)

    z_strides = Strides(z_stride_n, z_stride_h, z_stride_w, z_stride_c, Z_ALIGN)
    at = tile_offset(n, p, q, c, z_strides)
    tl.store(z_ptr + at, best.to(STORED), mask=mask)
    tl.store(taps_ptr + at, best_tap.to(taps_ptr.dtype.element_ty), mask=mask)
    tl.store(at_max_ptr + at, at_max.to(STORED), mask=mask)


def choose_tile(pixels: int, C: int, channels_fast: bool, dtype: torch.dtype) -> PlaneTile:
    """Pixels x channels of a program: 64 channels where these are adjacent, else one, so that neighbouring threads take
    neighbouring pixels; fewer pixels where a multiprocessor would have nothing to do. Not more pixels than 1024
    (problem.MAX_PIXELS).
    """
    BLOCK_C = min(64, triton.next_power_of_2(C)) if channels_fast else 1
    elements = 2048 if channels_fast and dtype != torch.float64 else 512
    while elements > 512 and cdiv(pixels, elements // BLOCK_C) * cdiv(C, BLOCK_C) < 2 * BUSY_PROGRAMS:
        elements //= 2
    return PlaneTile(min(1024, elements // BLOCK_C), BLOCK_C)


def constants(tile: PlaneTile, unroll: int) -> dict[str, Any]:
    """What a launch is given by keyword of its tile and of how many turns of its loop are one."""
    return {
        "tile": tile,
        "UNROLL": unroll,
        "BLOCK_M": tile.BLOCK_L,
        "BLOCK_C": tile.BLOCK_C,
        "num_warps": tile.num_warps,
        "maxnreg": MAX_REGISTERS,
    }


@launch.planned
def _plan(
    problem: PoolProblem, strides: tuple[int, ...], dtype: torch.dtype, eps: float, activation: str | None, slope: float
) -> tuple[launch.Launch[NormalisedPoolOperands], Layout, Layout]:
    y = Layout(problem.image, strides, dtype)
    z, taps = (dense(problem.pooled, t, result_format(y)) for t in (dtype, taps_dtype(problem)))
    # a row of a usual window at once: all of it would take too many registers
    tile = choose_tile(problem.N * problem.P * problem.Q, problem.C, is_channels_last(z), dtype)
    of_y, of_z = strides_nhwc(y), strides_nhwc(z)
    grid = (cdiv(problem.N * problem.P * problem.Q, tile.BLOCK_L) * cdiv(problem.C, tile.BLOCK_C),)
    run = launch.Launch(
        normalised_max_pool_kernel, grid, problem.N, problem.H, problem.W, problem.P, problem.Q, *of_y[:4], *of_z[:4],
        g=problem.geometry(), e=finish_of(dtype, eps, activation, slope), Y_ALIGN=of_y.align, Z_ALIGN=of_z.align,
        **constants(tile, problem.S if problem.R * problem.S <= MAX_UNROLL else PART_UNROLL),
    )  # fmt: skip
    return run, z, taps


def normalised_max_pool(
    problem: PoolProblem,
    y: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, taps, y at them), each [N, C, P, Q] in y's format: the bits of batchnorm.normalize and then `max_pool`.

    y [N, C, H, W] in any layout and of any kernel dtype; mean, var, gamma and beta [C] of any floating dtypes. Windows
    are not dilated, so that each holds a pixel.
    """
    run, layout, taps_layout = _plan(problem, y.stride(), y.dtype, eps, activation, slope)
    z, taps, at_max = memory.empty(layout, y), memory.empty(taps_layout, y), memory.empty(layout, y)
    run(NormalisedPoolOperands(y, *contiguous(mean, var, gamma, beta), z, taps, at_max))  # pyright: ignore
    return z, taps, at_max
