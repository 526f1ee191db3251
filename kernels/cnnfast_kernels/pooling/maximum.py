"""Max pooling and its backward.

    y[n, p, q, c] = max over taps (r, s) of x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c]

What backward needs of a maximum is its tap r * S + s: one byte for any usual window, where PyTorch keeps an int64.
Backward gathers: each pixel of dx sums over the windows that cover it, in a fixed order, so that overlapping windows
need no atomics.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..layout import Layout, dense, result_format
from ..problem import PoolProblem
from .rows import RUNTIME, element_offset, plan_rows, unravel_rows


@triton.jit
@no_type_check
def first_tap(start, DIL: tl.constexpr):
    """The first tap of a window from `start` on that lies at or after 0."""
    return (tl.maximum(-start, 0) + DIL - 1) // DIL


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def max_pool_kernel(
    x_ptr, y_ptr, taps_ptr, N, H, W, P, Q,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """The maximum and its tap r * S + s. The first of equal values wins, the last NaN wins: PyTorch's rule."""
    n, p, q, c, ok = unravel_rows(N, P, Q, C, CHANNELS_FAST, ROWS, VEC)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    x_rows = x_ptr + element_offset(n, h0, w0, c, x_stride_n, x_stride_h, x_stride_w, x_stride_c, X_ALIGN)

    best = tl.full((ROWS, VEC), float("-inf"), ACC)
    best_tap = (first_tap(h0, DIL_H) * S + first_tap(w0, DIL_W))[:, None] + tl.zeros((ROWS, VEC), tl.int32)
    for tap in tl.range(R * S, loop_unroll_factor=UNROLL):
        r = tap // S * DIL_H
        s = tap % S * DIL_W
        inside = ok & (h0 + r >= 0) & (h0 + r < H) & (w0 + s >= 0) & (w0 + s < W)
        offset = (r.to(tl.int64) * x_stride_h + s.to(tl.int64) * x_stride_w) * X_ALIGN
        x = tl.load(x_rows + offset, mask=inside[:, None], other=float("-inf")).to(ACC)
        take = (x > best) | (x != x)
        best = tl.where(take, x, best)
        best_tap = tl.where(take, tap, best_tap)

    y_offset = element_offset(n, p, q, c, y_stride_n, y_stride_h, y_stride_w, y_stride_c, Y_ALIGN)
    tl.store(y_ptr + y_offset, best.to(y_ptr.dtype.element_ty), mask=ok[:, None])
    if taps_ptr is not None:
        tl.store(taps_ptr + y_offset, best_tap.to(taps_ptr.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def max_pool_indices_kernel(
    taps_ptr, y_ptr, N, H, W, P, Q,
    taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c,
    y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    TAPS_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """h * W + w of each tap."""
    n, p, q, c, ok = unravel_rows(N, P, Q, C, CHANNELS_FAST, ROWS, VEC)
    taps_offset = element_offset(n, p, q, c, taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c, TAPS_ALIGN)
    tap = tl.load(taps_ptr + taps_offset, mask=ok[:, None], other=0).to(tl.int32)
    h = (p * STRIDE_H - PAD_H)[:, None] + tap // S * DIL_H
    w = (q * STRIDE_W - PAD_W)[:, None] + tap % S * DIL_W
    y_offset = element_offset(n, p, q, c, y_stride_n, y_stride_h, y_stride_w, y_stride_c, Y_ALIGN)
    tl.store(y_ptr + y_offset, h.to(tl.int64) * W + w, mask=ok[:, None])


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def max_pool_backward_kernel(
    dy_ptr, taps_ptr, dx_ptr, N, H, W, P, Q,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c,
    dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    DY_ALIGN: tl.constexpr, TAPS_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """dx = sum of dy over the windows whose tap is this pixel, p and q ascending."""
    COVER_H: tl.constexpr = (R - 1) * DIL_H // STRIDE_H + 1  # at most so many windows reach a row
    COVER_W: tl.constexpr = (S - 1) * DIL_W // STRIDE_W + 1
    n, h, w, c, ok = unravel_rows(N, H, W, C, CHANNELS_FAST, ROWS, VEC)
    p0 = (h + PAD_H) // STRIDE_H - (COVER_H - 1)
    q0 = (w + PAD_W) // STRIDE_W - (COVER_W - 1)
    dy_offset = element_offset(n, p0, q0, c, dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, DY_ALIGN)
    taps_offset = element_offset(n, p0, q0, c, taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c, TAPS_ALIGN)

    acc = tl.zeros((ROWS, VEC), ACC)
    for step in tl.range(COVER_H * COVER_W, loop_unroll_factor=UNROLL):
        i = step // COVER_W
        j = step % COVER_W
        p = p0 + i
        q = q0 + j
        from_h = h + PAD_H - p * STRIDE_H
        from_w = w + PAD_W - q * STRIDE_W
        covers = ok & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        covers = covers & (from_h % DIL_H == 0) & (from_w % DIL_W == 0) & (from_h < R * DIL_H) & (from_w < S * DIL_W)
        tap = from_h // DIL_H * S + from_w // DIL_W
        dy_step = (i.to(tl.int64) * dy_stride_h + j.to(tl.int64) * dy_stride_w) * DY_ALIGN
        taps_step = (i.to(tl.int64) * taps_stride_h + j.to(tl.int64) * taps_stride_w) * TAPS_ALIGN
        dy = tl.load(dy_ptr + dy_offset + dy_step, mask=covers[:, None], other=0.0).to(ACC)
        saved = tl.load(taps_ptr + taps_offset + taps_step, mask=covers[:, None], other=0)
        acc += tl.where(saved.to(tl.int32) == tap[:, None], dy, 0.0)

    dx_offset = element_offset(n, h, w, c, dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, DX_ALIGN)
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=ok[:, None])


def taps_dtype(problem: PoolProblem) -> torch.dtype:
    """What holds a tap r * S + s."""
    last = problem.R * problem.S - 1
    return next(t for t in (torch.uint8, torch.int16, torch.int32) if last <= torch.iinfo(t).max)


@launch.planned
def _plan_max(problem: PoolProblem, strides, dtype) -> tuple[launch.Launch, Layout, Layout]:
    g = problem
    x = Layout((g.N, g.C, g.H, g.W), strides, dtype)
    y, taps = (dense((g.N, g.C, g.P, g.Q), t, result_format(x)) for t in (dtype, taps_dtype(g)))
    acc = KERNEL_DTYPES[accumulator_dtype(dtype)]
    run = plan_rows(max_pool_kernel, g, {"X": x, "Y": y}, g.R * g.S, DIL_H=g.dil_h, DIL_W=g.dil_w, ACC=acc)
    return run, y, taps


def max_pool(problem: PoolProblem, x: torch.Tensor, with_taps: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y [N, C, P, Q] and, if asked, the tap r * S + s of each maximum, which backward and max_pool_indices read.

    x [N, C, H, W] in any layout and of any kernel dtype; y is channels_last if x is, taps (of `taps_dtype`) lie as y
    does. Ties, NaN and windows of -inf go as in PyTorch.
    """
    run, y_layout, taps_layout = _plan_max(problem, x.stride(), x.dtype)
    y = memory.empty(y_layout, x)
    taps = memory.empty(taps_layout, x) if with_taps else None
    run((x, y, taps))
    return y, taps


@launch.planned
def _plan_indices(problem: PoolProblem, strides, dtype) -> tuple[launch.Launch, Layout]:
    g = problem
    taps = Layout((g.N, g.C, g.P, g.Q), strides, dtype)
    indices = dense(taps.shape, torch.int64, result_format(taps))
    return plan_rows(max_pool_indices_kernel, g, {"TAPS": taps, "Y": indices}, 1, DIL_H=g.dil_h, DIL_W=g.dil_w), indices


def max_pool_indices(problem: PoolProblem, taps: torch.Tensor) -> torch.Tensor:
    """PyTorch's indices, h * W + w of each maximum, int64 [N, C, P, Q] in the layout of `taps`."""
    run, layout = _plan_indices(problem, taps.stride(), taps.dtype)
    indices = memory.empty(layout, taps)
    run((taps, indices))
    return indices


@launch.planned
def _plan_backward(
    problem: PoolProblem, dy_strides, taps_strides, dtype, tap_dtype, memory_format
) -> tuple[launch.Launch, Layout]:
    g = problem
    dy = Layout((g.N, g.C, g.P, g.Q), dy_strides, dtype)
    taps = Layout(dy.shape, taps_strides, tap_dtype)
    dx = dense((g.N, g.C, g.H, g.W), dtype, memory_format)
    cover = ((g.R - 1) * g.dil_h // g.stride_h + 1) * ((g.S - 1) * g.dil_w // g.stride_w + 1)
    acc = KERNEL_DTYPES[accumulator_dtype(dtype)]
    operands = {"DY": dy, "TAPS": taps, "DX": dx}
    return plan_rows(max_pool_backward_kernel, g, operands, cover, DIL_H=g.dil_h, DIL_W=g.dil_w, ACC=acc), dx


def max_pool_backward(
    problem: PoolProblem, dy: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """dx [N, C, H, W] in `memory_format`, from dy and taps [N, C, P, Q] in any layout."""
    run, layout = _plan_backward(problem, dy.stride(), taps.stride(), dy.dtype, taps.dtype, memory_format)
    dx = memory.empty(layout, dy)
    run((dy, taps, dx))
    return dx
