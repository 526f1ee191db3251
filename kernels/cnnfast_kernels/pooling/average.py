"""Average and adaptive average pooling, and their backward.

    y[n, p, q, c] = sum of x over window (p, q) / its number of pixels

Backward gathers: each pixel of dx sums over the windows that cover it, in a fixed order, so that no atomics are needed.
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
from ..rounding import round_quotient
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


class AverageOperands(NamedTuple):
    """x [N, C, H, W] and the result y [N, C, P, Q]."""

    x: torch.Tensor
    y: torch.Tensor


class AverageBackwardOperands(NamedTuple):
    """dy [N, C, P, Q] and the result dx [N, C, H, W]."""

    dy: torch.Tensor
    dx: torch.Tensor


class Averaging(NamedTuple):
    """What a kernel is compiled for besides its geometry: its constexpr argument `a`.

    divisor: that of every window, or None: then each divides by its own pixels, those in the padding counted or not.
    adaptive: windows follow from H / P and W / Q, not from the geometry.
    """

    divisor: int | None
    count_pad: bool
    adaptive: bool


@triton.jit
@no_type_check
def window(p, H, P, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Window p of an average covers [start, end). PyTorch counts the padding in it, but not what ceil_mode lets run
    beyond that.
    """
    if ADAPTIVE:
        start = (p.to(tl.int64) * H // P).to(tl.int32)
        end = (((p + 1).to(tl.int64) * H + P - 1) // P).to(tl.int32)
    else:
        start = p * STRIDE - PAD
        end = tl.minimum(start + R, H + PAD)
    return start, end


@triton.jit
@no_type_check
def window_pixels(h0, h1, w0, w1, H, W, COUNT_PAD: tl.constexpr):
    """Pixels of [h0, h1) x [w0, w1), those outside the image included or not."""
    if not COUNT_PAD:
        h0 = tl.maximum(h0, 0)
        w0 = tl.maximum(w0, 0)
        h1 = tl.minimum(h1, H)
        w1 = tl.minimum(w1, W)
    return (h1 - h0) * (w1 - w0)


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def avg_pool_kernel(
    x_ptr, y_ptr, N, H, W, P, Q,
    x_stride_n, x_stride_h, x_stride_w, x_stride_c, y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    g: tl.constexpr, a: tl.constexpr, align: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """y = the sum of x over each window, divided. a: Averaging."""
    n, p, q, c, ok = unravel_rows(N, P, Q, g.C, CHANNELS_FAST, ROWS, VEC)
    h0, h1 = window(p, H, P, g.R, g.stride_h, g.pad_h, a.adaptive)
    w0, w1 = window(q, W, Q, g.S, g.stride_w, g.pad_w, a.adaptive)
    if a.adaptive:
        extent_h = tl.cdiv(H, P) + 1
        extent_w = tl.cdiv(W, Q) + 1
    else:
        extent_h: tl.constexpr = g.R
        extent_w: tl.constexpr = g.S
    x_strides = Strides(x_stride_n, x_stride_h, x_stride_w, x_stride_c, align.x)
    x_rows = x_ptr + element_offset(n, h0, w0, c, x_strides)

    acc = tl.zeros((ROWS, VEC), ACC)
    for tap in tl.range(extent_h * extent_w, loop_unroll_factor=UNROLL):
        r = tap // extent_w
        s = tap % extent_w
        inside = lies_within(ok, h0 + r, w0 + s, tl.minimum(h1, H), tl.minimum(w1, W))
        acc += tl.load(x_rows + step_offset(r, s, x_strides), mask=inside[:, None], other=0.0).to(ACC)

    if a.divisor is None:
        y = round_quotient(acc, window_pixels(h0, h1, w0, w1, H, W, a.count_pad).to(ACC)[:, None])
    else:
        y = round_quotient(acc, tl.full((ROWS, VEC), a.divisor, ACC))
    y_offset = element_offset(n, p, q, c, Strides(y_stride_n, y_stride_h, y_stride_w, y_stride_c, align.y))
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def avg_pool_backward_kernel(
    dy_ptr, dx_ptr, N, H, W, P, Q,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    g: tl.constexpr, a: tl.constexpr, align: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """dx = sum of dy / divisor over the windows that cover this pixel, p and q ascending. a: Averaging."""
    n, h, w, c, ok = unravel_rows(N, H, W, g.C, CHANNELS_FAST, ROWS, VEC)
    if a.adaptive:
        cover_h = tl.cdiv(P, H) + 1
        cover_w = tl.cdiv(Q, W) + 1
        p0 = (h.to(tl.int64) * P // H).to(tl.int32)
        q0 = (w.to(tl.int64) * Q // W).to(tl.int32)
    else:
        cover_h: tl.constexpr = g.cover_h
        cover_w: tl.constexpr = g.cover_w
        p0, q0 = first_covering(h, w, g)
    dy_strides = Strides(dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, align.dy)
    dy_rows = dy_ptr + element_offset(n, p0, q0, c, dy_strides)

    acc = tl.zeros((ROWS, VEC), ACC)
    for step in tl.range(cover_h * cover_w, loop_unroll_factor=UNROLL):
        i = step // cover_w
        j = step % cover_w
        p = p0 + i
        q = q0 + j
        h0, h1 = window(p, H, P, g.R, g.stride_h, g.pad_h, a.adaptive)
        w0, w1 = window(q, W, Q, g.S, g.stride_w, g.pad_w, a.adaptive)
        covers = lies_within(ok, p, q, P, Q) & (h0 <= h) & (h < h1) & (w0 <= w) & (w < w1)
        dy = tl.load(dy_rows + step_offset(i, j, dy_strides), mask=covers[:, None], other=0.0).to(ACC)
        if a.divisor is None:
            pixels = tl.where(covers, window_pixels(h0, h1, w0, w1, H, W, a.count_pad), 1)
            dy = round_quotient(dy, pixels.to(ACC)[:, None])
        acc += dy

    if a.divisor is not None:
        acc = round_quotient(acc, tl.full((ROWS, VEC), a.divisor, ACC))
    dx_offset = element_offset(n, h, w, c, Strides(dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, align.dx))
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=ok[:, None])


def _divisor(problem: PoolProblem, count_include_pad: bool, divisor_override: int | None) -> int | None:
    """What every window divides by, or None if they differ."""
    g = problem
    if divisor_override is not None:
        return divisor_override
    whole = (g.P - 1) * g.stride_h + g.R <= g.H + 2 * g.pad_h and (g.Q - 1) * g.stride_w + g.S <= g.W + 2 * g.pad_w
    return g.R * g.S if whole and (count_include_pad or g.pad_h == g.pad_w == 0) else None


Divided = tuple[bool, int | None] | None  # (count_include_pad, divisor_override) of an average; None of an adaptive one


def _averaging(problem: PoolProblem, divided: Divided) -> Averaging:
    if divided is None:
        return Averaging(None, True, True)
    return Averaging(_divisor(problem, *divided), divided[0], False)


@launch.planned
def _plan(
    problem: PoolProblem, divided: Divided, strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[launch.Launch[AverageOperands], Layout]:
    x = Layout(problem.image, strides, dtype)
    y = dense(problem.pooled, dtype, result_format(x))
    acc = KERNEL_DTYPES[accumulator_dtype(dtype)]
    return plan_rows(
        avg_pool_kernel, problem, PoolLayouts(x=x, y=y), acc, problem.R * problem.S, a=_averaging(problem, divided)
    ), y


@launch.planned
def _plan_backward(
    problem: PoolProblem,
    divided: Divided,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[launch.Launch[AverageBackwardOperands], Layout]:
    dy, dx = Layout(problem.pooled, strides, dtype), dense(problem.image, dtype, memory_format)
    g = problem.geometry()
    acc = KERNEL_DTYPES[accumulator_dtype(dtype)]
    return plan_rows(
        avg_pool_backward_kernel,
        problem,
        PoolLayouts(dy=dy, dx=dx),
        acc,
        g.cover_h * g.cover_w,
        a=_averaging(problem, divided),
    ), dx


def _average(problem: PoolProblem, divided: Divided, x: torch.Tensor) -> torch.Tensor:
    run, layout = _plan(problem, divided, x.stride(), x.dtype)
    y = memory.empty(layout, x)
    run(AverageOperands(x, y))
    return y


def _average_backward(
    problem: PoolProblem, divided: Divided, dy: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    run, layout = _plan_backward(problem, divided, dy.stride(), dy.dtype, memory_format)
    dx = memory.empty(layout, dy)
    run(AverageBackwardOperands(dy, dx))
    return dx


def avg_pool(
    problem: PoolProblem, x: torch.Tensor, count_include_pad: bool, divisor_override: int | None
) -> torch.Tensor:
    """y [N, C, P, Q], channels_last if x [N, C, H, W] is; divided as torch.nn.functional.avg_pool2d divides. No window
    is dilated.
    """
    return _average(problem, (count_include_pad, divisor_override), x)


def avg_pool_backward(
    problem: PoolProblem,
    dy: torch.Tensor,
    count_include_pad: bool,
    divisor_override: int | None,
    memory_format: torch.memory_format,
) -> torch.Tensor:
    """dx [N, C, H, W] in `memory_format`, from dy [N, C, P, Q] in any layout."""
    return _average_backward(problem, (count_include_pad, divisor_override), dy, memory_format)


@launch.planned
def _adaptive_problem(x_shape: tuple[int, ...], P: int, Q: int) -> PoolProblem:
    N, C, H, W = x_shape
    return PoolProblem(N, C, H, W, 1, 1, P, Q, 1, 1)


def adaptive_avg_pool(x: torch.Tensor, P: int, Q: int) -> torch.Tensor:
    """y [N, C, P, Q], channels_last if x [N, C, H, W] is: window p covers rows floor(p * H / P) to ceil((p + 1) * H /
    P).
    """
    return _average(_adaptive_problem(x.shape, P, Q), None, x)


def adaptive_avg_pool_backward(
    dy: torch.Tensor, x_shape: tuple[int, int, int, int], memory_format: torch.memory_format
) -> torch.Tensor:
    """dx of shape [N, C, H, W] = `x_shape` in `memory_format`, from dy [N, C, P, Q] in any layout."""
    if dy.numel() == 0:  # no windows
        return memory.empty(x_shape, dy, memory_format).zero_()
    P, Q = dy.shape[2:]
    return _average_backward(_adaptive_problem(x_shape, P, Q), None, dy, memory_format)
