"""Max pooling and its backward.

    y[n, p, q, c] = max over taps (r, s) of x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c]

What backward needs of a maximum is its tap r * S + s: one byte for any usual window, where PyTorch keeps an int64.
Backward gathers: each pixel of dx sums over the windows that cover it, in a fixed order, so that overlapping windows
need no atomics.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..dtypes import KERNEL_DTYPES, accumulator_dtype
from ..layout import Layout, Strides, dense, result_format
from ..problem import PoolProblem
from .rows import (
    RUNTIME,
    PoolLayouts,
    element_offset,
    first_covering,
    lies_within,
    plan_rows,
    step_offset,
    unravel_rows,
)


class MaxPoolOperands(NamedTuple):
    """x [N, C, H, W], the result y [N, C, P, Q] and, if asked for, the taps of its maxima, laid as y is."""

    x: torch.Tensor
    y: torch.Tensor
    taps: torch.Tensor | None


class IndicesOperands(NamedTuple):
    """taps and the result y, PyTorch's indices, both [N, C, P, Q]."""

    taps: torch.Tensor
    y: torch.Tensor


class MaxPoolBackwardOperands(NamedTuple):
    """dy and taps [N, C, P, Q], and the result dx [N, C, H, W]."""

    dy: torch.Tensor
    taps: torch.Tensor
    dx: torch.Tensor


@triton.jit
@no_type_check
def first_tap(start, DIL: tl.constexpr):
    """The first tap of a window from `start` on that lies at or after 0."""
    return (tl.maximum(-start, 0) + DIL - 1) // DIL


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def max_pool_kernel(
    x_ptr, y_ptr, taps_ptr, N, H, W, P, Q,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c, y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    g: tl.constexpr, align: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """The maximum and its tap r * S + s. The first of equal values wins, the last NaN wins: PyTorch's rule."""
    n, p, q, c, ok = unravel_rows(N, P, Q, g.C, CHANNELS_FAST, ROWS, VEC)
    h0 = p * g.stride_h - g.pad_h
    w0 = q * g.stride_w - g.pad_w
    x_strides = Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, align.x)
    x_rows = x_ptr + element_offset(n, h0, w0, c, x_strides)

    best = tl.full((ROWS, VEC), float("-inf"), ACC)
    best_tap = (first_tap(h0, g.dil_h) * g.S + first_tap(w0, g.dil_w))[:, None] + tl.zeros((ROWS, VEC), tl.int32)
    for tap in tl.range(g.R * g.S, loop_unroll_factor=UNROLL):
        r = tap // g.S * g.dil_h
        s = tap % g.S * g.dil_w
        inside = lies_within(ok, h0 + r, w0 + s, H, W)
        x = tl.load(x_rows + step_offset(r, s, x_strides), mask=inside[:, None], other=float("-inf")).to(ACC)
        take = (x > best) | (x != x)
        best = tl.where(take, x, best)
        best_tap = tl.where(take, tap, best_tap)

    y_offset = element_offset(n, p, q, c, Strides(y_stride_n, y_stride_h, y_stride_w, y_stride_c, align.y))
    tl.store(y_ptr + y_offset, best.to(y_ptr.dtype.element_ty), mask=ok[:, None])
    if taps_ptr is not None:
        tl.store(taps_ptr + y_offset, best_tap.to(taps_ptr.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def max_pool_indices_kernel(
    taps_ptr, y_ptr, N, H, W, P, Q,
    taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c, y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    g: tl.constexpr, align: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """h * W + w of each tap."""
    n, p, q, c, ok = unravel_rows(N, P, Q, g.C, CHANNELS_FAST, ROWS, VEC)
    taps_strides = Strides(taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c, align.taps)
    tap = tl.load(taps_ptr + element_offset(n, p, q, c, taps_strides), mask=ok[:, None], other=0).to(tl.int32)
    h = (p * g.stride_h - g.pad_h)[:, None] + tap // g.S * g.dil_h
    w = (q * g.stride_w - g.pad_w)[:, None] + tap % g.S * g.dil_w
    y_offset = element_offset(n, p, q, c, Strides(y_stride_n, y_stride_h, y_stride_w, y_stride_c, align.y))
    tl.store(y_ptr + y_offset, h.to(ACC) * W + w, mask=ok[:, None])


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def max_pool_backward_kernel(
    dy_ptr, taps_ptr, dx_ptr, N, H, W, P, Q,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c,
    dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    g: tl.constexpr, align: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """dx = sum of dy over the windows whose tap is this pixel, p and q ascending."""
    n, h, w, c, ok = unravel_rows(N, H, W, g.C, CHANNELS_FAST, ROWS, VEC)
    p0, q0 = first_covering(h, w, g)
    dy_strides = Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, align.dy)
    taps_strides = Strides(taps_stride_n, taps_stride_h, taps_stride_w, taps_stride_c, align.taps)
    dy_rows = dy_ptr + element_offset(n, p0, q0, c, dy_strides)
    taps_rows = taps_ptr + element_offset(n, p0, q0, c, taps_strides)

    acc = tl.zeros((ROWS, VEC), ACC)
    for step in tl.range(g.cover_h * g.cover_w, loop_unroll_factor=UNROLL):
        i = step // g.cover_w
        j = step % g.cover_w
        p = p0 + i
        q = q0 + j
        from_h = h + g.pad_h - p * g.stride_h
        from_w = w + g.pad_w - q * g.stride_w
        covers = lies_within(ok, p, q, P, Q)
        covers = covers & (from_h % g.dil_h == 0) & (from_w % g.dil_w == 0)
        covers = covers & (from_h < g.R * g.dil_h) & (from_w < g.S * g.dil_w)
        tap = from_h // g.dil_h * g.S + from_w // g.dil_w
        dy_step = step_offset(i, j, dy_strides)
        taps_step = step_offset(i, j, taps_strides)
        dy = tl.load(dy_rows + dy_step, mask=covers[:, None], other=0.0).to(ACC)
        saved = tl.load(taps_rows + taps_step, mask=covers[:, None], other=0)
        acc += tl.where(saved.to(tl.int32) == tap[:, None], dy, 0.0)

    dx_offset = element_offset(n, h, w, c, Strides(dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, align.dx))
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=ok[:, None])


def taps_dtype(problem: PoolProblem) -> torch.dtype:
    """What holds a tap r * S + s."""
    last = problem.R * problem.S - 1
    return next(t for t in (torch.uint8, torch.int16, torch.int32) if last <= torch.iinfo(t).max)


@launch.planned
def _plan_max(
    problem: PoolProblem, strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[launch.Launch[MaxPoolOperands], Layout, Layout]:
    x = Layout(problem.image, strides, dtype)
    y, taps = (dense(problem.pooled, t, result_format(x)) for t in (dtype, taps_dtype(problem)))
    acc = KERNEL_DTYPES[accumulator_dtype(dtype)]
    return plan_rows(max_pool_kernel, problem, PoolLayouts(x=x, y=y), acc, problem.R * problem.S), y, taps


def max_pool(problem: PoolProblem, x: torch.Tensor, with_taps: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y [N, C, P, Q] and, if asked, the tap r * S + s of each maximum, which backward and max_pool_indices read.

    x [N, C, H, W] in any layout and of any kernel dtype; y is channels_last if x is, taps (of `taps_dtype`) lie as y
    does. Ties, NaN and windows of -inf go as in PyTorch.
    """
    run, y_layout, taps_layout = _plan_max(problem, x.stride(), x.dtype)
    y = memory.empty(y_layout, x)
    taps = memory.empty(taps_layout, x) if with_taps else None
    run(MaxPoolOperands(x, y, taps))
    return y, taps


@launch.planned
def _plan_indices(
    problem: PoolProblem, strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[launch.Launch[IndicesOperands], Layout]:
    taps = Layout(problem.pooled, strides, dtype)
    y = dense(taps.shape, torch.int64, result_format(taps))
    return plan_rows(max_pool_indices_kernel, problem, PoolLayouts(taps=taps, y=y), tl.int64, 1), y


def max_pool_indices(problem: PoolProblem, taps: torch.Tensor) -> torch.Tensor:
    """PyTorch's indices, h * W + w of each maximum, int64 [N, C, P, Q] in the layout of `taps`."""
    run, layout = _plan_indices(problem, taps.stride(), taps.dtype)
    indices = memory.empty(layout, taps)
    run(IndicesOperands(taps, indices))
    return indices


@launch.planned
def _plan_backward(
    problem: PoolProblem,
    dy_strides: tuple[int, ...],
    taps_strides: tuple[int, ...],
    dtype: torch.dtype,
    tap_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[launch.Launch[MaxPoolBackwardOperands], Layout]:
    dy, taps = Layout(problem.pooled, dy_strides, dtype), Layout(problem.pooled, taps_strides, tap_dtype)
    dx = dense(problem.image, dtype, memory_format)
    g = problem.geometry()
    acc = KERNEL_DTYPES[accumulator_dtype(dtype)]
    layouts = PoolLayouts(dy=dy, taps=taps, dx=dx)
    return plan_rows(max_pool_backward_kernel, problem, layouts, acc, g.cover_h * g.cover_w), dx


def max_pool_backward(
    problem: PoolProblem, dy: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """dx [N, C, H, W] in `memory_format`, from dy and taps [N, C, P, Q] in any layout."""
    run, layout = _plan_backward(problem, dy.stride(), taps.stride(), dy.dtype, taps.dtype, memory_format)
    dx = memory.empty(layout, dy)
    run(MaxPoolBackwardOperands(dy, taps, dx))
    return dx
