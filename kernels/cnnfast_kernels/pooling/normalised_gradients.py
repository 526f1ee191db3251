"""The gradient of max pooling what a batch norm and an activation made of a tensor, as normalised.py pools it.

A gradient of z goes to one pixel of y alone. Hence the sums of a batch norm's gradients are those over the pixels of z,
with y at the maximum in the place of y: batchnorm/sums.py computes them. The gradient of y takes these sums:

    dy = scale * (g - sum g / rows - xhat * sum(g * xhat) / rows),  xhat = (y - mean) * invstd

with g = act'(u) times the sum of dz over the windows whose maximum is this pixel, in a fixed order: no atomics are
needed.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..activations import activate_backward
from ..epilogue import finish_of
from ..layout import Layout, Strides, dense, is_channels_last, result_format, strides_nhwc
from ..planes import contiguous, load_vector
from ..problem import PoolProblem
from ..rounding import round_quotient, round_root
from ..tiling import cdiv
from .normalised import SIZES, choose_tile, constants, locate_pixels, tile_offset
from .rows import MAX_UNROLL, PART_UNROLL, first_covering, lies_within, step_offset

STRIDES = [f"{t}_stride_{d}" for t in ("dz", "taps", "y", "dy") for d in "nhwc"]


class NormalisedPoolBackwardOperands(NamedTuple):
    """dz and taps [N, C, P, Q]; y [N, C, H, W]; mean, var, gamma and beta as in NormalisedPoolOperands; sums [2, C] of
    g and of g * xhat; and the result dy [N, C, H, W].
    """

    dz: torch.Tensor
    taps: torch.Tensor
    y: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    sums: torch.Tensor
    dy: torch.Tensor


class NormalisedAlignments(NamedTuple):
    """The alignment of each one's strides in elements: a kernel's constexpr argument `align`."""

    dz: int
    taps: int
    y: int
    dy: int


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
@no_type_check
def normalised_max_pool_backward_kernel(
    dz_ptr, taps_ptr, y_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, sums_ptr, dy_ptr, N, H, W, P, Q,
    dz_stride_n, dz_stride_h, dz_stride_w, dz_stride_c, taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c,
    y_stride_n, y_stride_h, y_stride_w, y_stride_c, dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    g: tl.constexpr, e: tl.constexpr, align: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of dy. g: PoolGeometry, not dilated; e: Finish; align: NormalisedAlignments."""
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    ACTIVATION: tl.constexpr = e.activation
    n, h, w, ok, c, c_ok = locate_pixels(N * H * W, H, W, g.C, BLOCK_M, BLOCK_C)
    p0, q0 = first_covering(h, w, g)
    dz_strides = Strides(dz_stride_n, dz_stride_h, dz_stride_w, dz_stride_c, align.dz)
    taps_strides = Strides(taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c, align.taps)
    dz_rows = dz_ptr + tile_offset(n, p0, q0, c, dz_strides)
    taps_rows = taps_ptr + tile_offset(n, p0, q0, c, taps_strides)
    gradient = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for step in tl.range(g.cover_h * g.cover_w, loop_unroll_factor=UNROLL):
        i = step // g.cover_w
        j = step % g.cover_w
        r = h + g.pad_h - (p0 + i) * g.stride_h
        s = w + g.pad_w - (q0 + j) * g.stride_w
        covers = lies_within(ok, p0 + i, q0 + j, P, Q) & (r < g.R) & (s < g.S)
        mask = covers[:, None] & c_ok[None, :]
        dz = tl.load(dz_rows + step_offset(i, j, dz_strides), mask=mask, other=0.0).to(ACC)
        saved = tl.load(taps_rows + step_offset(i, j, taps_strides), mask=mask, other=0).to(tl.int32)
        gradient += tl.where(saved == (r * g.S + s)[:, None], dz, 0.0)

    mask = ok[:, None] & c_ok[None, :]
    y_strides = Strides(y_stride_n, y_stride_h, y_stride_w, y_stride_c, align.y)
    y = tl.load(y_ptr + tile_offset(n, h, w, c, y_strides), mask=mask, other=0.0).to(ACC)
    invstd = round_quotient(1.0, round_root(load_vector(var_ptr, c, c_ok, ACC) + e.eps))
    scale = invstd
    if gamma_ptr is not None:
        scale = load_vector(gamma_ptr, c, c_ok, ACC) * invstd
    centred = y - load_vector(mean_ptr, c, c_ok, ACC)[None, :]
    u = centred * scale[None, :]
    if beta_ptr is not None:
        u = u + load_vector(beta_ptr, c, c_ok, ACC)[None, :]
    gradient = activate_backward(gradient, u, tl.full((), e.slope, ACC), ACTIVATION, y_ptr.dtype.element_ty)
    rows = (N * H * W).to(ACC)
    mean_g = round_quotient(load_vector(sums_ptr, c, c_ok, ACC), rows)
    mean_gx = round_quotient(load_vector(sums_ptr + g.C, c, c_ok, ACC), rows)
    xhat = centred * invstd[None, :]
    gradient = (gradient - mean_g[None, :] - xhat * mean_gx[None, :]) * scale[None, :]
    at = tile_offset(n, h, w, c, Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, align.dy))
    tl.store(dy_ptr + at, gradient.to(dy_ptr.dtype.element_ty), mask=mask)


@launch.planned
def _plan_backward(
    problem: PoolProblem,
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    tap_dtype: torch.dtype,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[launch.Launch[NormalisedPoolBackwardOperands], Layout]:
    dz, taps = Layout(problem.pooled, strides[0], dtype), Layout(problem.pooled, strides[1], tap_dtype)
    y = Layout(problem.image, strides[2], dtype)
    dy = dense(problem.image, dtype, result_format(y))
    laid = [strides_nhwc(t) for t in (dz, taps, y, dy)]
    pixels, geometry = problem.N * problem.H * problem.W, problem.geometry()
    covering = geometry.cover_h * geometry.cover_w
    tile = choose_tile(pixels, problem.C, is_channels_last(dy), dtype)
    run = launch.Launch(
        normalised_max_pool_backward_kernel, (cdiv(pixels, tile.BLOCK_L) * cdiv(problem.C, tile.BLOCK_C),),
        problem.N, problem.H, problem.W, problem.P, problem.Q, *(s for t in laid for s in t[:4]),
        g=geometry, e=finish_of(dtype, eps, activation, slope), align=NormalisedAlignments(*(t.align for t in laid)),
        **constants(tile, covering if covering <= MAX_UNROLL else PART_UNROLL),
    )  # fmt: skip
    return run, dy


def normalised_max_pool_backward(
    problem: PoolProblem,
    dz: torch.Tensor,
    taps: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    sums: torch.Tensor,
    eps: float,
    activation: str | None,
    slope: float,
) -> torch.Tensor:
    """dy [N, C, H, W] in y's format, of `normalised_max_pool` where mean and var are y's own.

    dz and taps [N, C, P, Q] in any layout; sums [2, C], contiguous: of g and of g * xhat, as batchnorm.gradient_sums
    gives them of dz and y at the taps. The activation's derivative is told from its output.
    """
    strides = dz.stride(), taps.stride(), y.stride()
    run, layout = _plan_backward(problem, strides, y.dtype, taps.dtype, eps, activation, slope)
    dy = memory.empty(layout, y)
    vectors = contiguous(mean, var, gamma, beta)
    run(NormalisedPoolBackwardOperands(dz, taps, y, *vectors, sums, dy))  # pyright: ignore
    return dy
