"""Average and adaptive average pooling, and their backward.

    y[n, p, q, c] = sum of x over window (p, q) / its number of pixels

Backward gathers: each pixel of dx sums over the windows that cover it, in a fixed order, so that no atomics are needed.
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
from ..rounding import round_quotient
from .rows import RUNTIME, element_offset, plan_rows, unravel_rows


@triton.jit
@no_type_check
def window(p, H, P, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Window p of an average covers [start, end): PyTorch counts its padding, but not what ceil_mode lets run beyond
    that.
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
    x_stride_n, x_stride_h, x_stride_w, x_stride_c,
    y_stride_n, y_stride_h, y_stride_w, y_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIVISOR: tl.constexpr, COUNT_PAD: tl.constexpr, ADAPTIVE: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """DIVISOR: that of every window, or None: then each divides by its own pixels. ADAPTIVE: windows follow from H / P
    and W / Q.
    """
    n, p, q, c, ok = unravel_rows(N, P, Q, C, CHANNELS_FAST, ROWS, VEC)
    h0, h1 = window(p, H, P, R, STRIDE_H, PAD_H, ADAPTIVE)
    w0, w1 = window(q, W, Q, S, STRIDE_W, PAD_W, ADAPTIVE)
    if ADAPTIVE:
        extent_h = tl.cdiv(H, P) + 1
        extent_w = tl.cdiv(W, Q) + 1
    else:
        extent_h: tl.constexpr = R
        extent_w: tl.constexpr = S
    x_rows = x_ptr + element_offset(n, h0, w0, c, x_stride_n, x_stride_h, x_stride_w, x_stride_c, X_ALIGN)

    acc = tl.zeros((ROWS, VEC), ACC)
    for tap in tl.range(extent_h * extent_w, loop_unroll_factor=UNROLL):
        r = tap // extent_w
        s = tap % extent_w
        inside = ok & (h0 + r >= 0) & (h0 + r < tl.minimum(h1, H)) & (w0 + s >= 0) & (w0 + s < tl.minimum(w1, W))
        offset = (r.to(tl.int64) * x_stride_h + s.to(tl.int64) * x_stride_w) * X_ALIGN
        acc += tl.load(x_rows + offset, mask=inside[:, None], other=0.0).to(ACC)

    if DIVISOR is None:
        y = round_quotient(acc, window_pixels(h0, h1, w0, w1, H, W, COUNT_PAD).to(ACC)[:, None])
    else:
        y = round_quotient(acc, tl.full((ROWS, VEC), DIVISOR, ACC))
    y_offset = element_offset(n, p, q, c, y_stride_n, y_stride_h, y_stride_w, y_stride_c, Y_ALIGN)
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def avg_pool_backward_kernel(
    dy_ptr, dx_ptr, N, H, W, P, Q,
    dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c,
    dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIVISOR: tl.constexpr, COUNT_PAD: tl.constexpr, ADAPTIVE: tl.constexpr,
    DY_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, CHANNELS_FAST: tl.constexpr,
):  # fmt: skip
    """dx = sum of dy / divisor over the windows that cover this pixel, p and q ascending."""
    n, h, w, c, ok = unravel_rows(N, H, W, C, CHANNELS_FAST, ROWS, VEC)
    if ADAPTIVE:
        cover_h = tl.cdiv(P, H) + 1
        cover_w = tl.cdiv(Q, W) + 1
        p0 = (h.to(tl.int64) * P // H).to(tl.int32)
        q0 = (w.to(tl.int64) * Q // W).to(tl.int32)
    else:
        cover_h: tl.constexpr = (R - 1) // STRIDE_H + 1
        cover_w: tl.constexpr = (S - 1) // STRIDE_W + 1
        p0 = (h + PAD_H) // STRIDE_H - (cover_h - 1)
        q0 = (w + PAD_W) // STRIDE_W - (cover_w - 1)
    dy_rows = dy_ptr + element_offset(n, p0, q0, c, dy_stride_n, dy_stride_h, dy_stride_w, dy_stride_c, DY_ALIGN)

    acc = tl.zeros((ROWS, VEC), ACC)
    for step in tl.range(cover_h * cover_w, loop_unroll_factor=UNROLL):
        i = step // cover_w
        j = step % cover_w
        p = p0 + i
        q = q0 + j
        h0, h1 = window(p, H, P, R, STRIDE_H, PAD_H, ADAPTIVE)
        w0, w1 = window(q, W, Q, S, STRIDE_W, PAD_W, ADAPTIVE)
        covers = ok & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (h0 <= h) & (h < h1) & (w0 <= w) & (w < w1)
        offset = (i.to(tl.int64) * dy_stride_h + j.to(tl.int64) * dy_stride_w) * DY_ALIGN
        dy = tl.load(dy_rows + offset, mask=covers[:, None], other=0.0).to(ACC)
        if DIVISOR is None:
            pixels = tl.where(covers, window_pixels(h0, h1, w0, w1, H, W, COUNT_PAD), 1)
            dy = round_quotient(dy, pixels.to(ACC)[:, None])
        acc += dy

    if DIVISOR is not None:
        acc = round_quotient(acc, tl.full((ROWS, VEC), DIVISOR, ACC))
    dx_offset = element_offset(n, h, w, c, dx_stride_n, dx_stride_h, dx_stride_w, dx_stride_c, DX_ALIGN)
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=ok[:, None])


def _divisor(problem: PoolProblem, count_include_pad: bool, divisor_override: int | None) -> int | None:
    """What every window divides by, or None if they differ."""
    g = problem
    if divisor_override is not None:
        return divisor_override
    whole = (g.P - 1) * g.stride_h + g.R <= g.H + 2 * g.pad_h and (g.Q - 1) * g.stride_w + g.S <= g.W + 2 * g.pad_w
    return g.R * g.S if whole and (count_include_pad or g.pad_h == g.pad_w == 0) else None


@launch.planned
def _plan(
    problem: PoolProblem,
    strides,
    dtype,
    memory_format,
    adaptive: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[launch.Launch, Layout]:
    """Forward, or, where the result's memory format is given, backward."""
    g = problem
    options = {
        "DIVISOR": None if adaptive else _divisor(g, count_include_pad, divisor_override),
        "COUNT_PAD": count_include_pad,
        "ADAPTIVE": adaptive,
        "ACC": KERNEL_DTYPES[accumulator_dtype(dtype)],
    }
    image, pooled = (g.N, g.C, g.H, g.W), (g.N, g.C, g.P, g.Q)
    if memory_format is None:
        x = Layout(image, strides, dtype)
        y = dense(pooled, dtype, result_format(x))
        return plan_rows(avg_pool_kernel, g, {"X": x, "Y": y}, g.R * g.S, **options), y
    dy, dx = Layout(pooled, strides, dtype), dense(image, dtype, memory_format)
    cover = ((g.R - 1) // g.stride_h + 1) * ((g.S - 1) // g.stride_w + 1)
    return plan_rows(avg_pool_backward_kernel, g, {"DY": dy, "DX": dx}, cover, **options), dx


def _average(
    problem: PoolProblem, x: torch.Tensor, memory_format: torch.memory_format | None, adaptive: bool,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> torch.Tensor:  # fmt: skip
    run, layout = _plan(problem, x.stride(), x.dtype, memory_format, adaptive, count_include_pad, divisor_override)
    y = memory.empty(layout, x)
    run((x, y))
    return y


def avg_pool(
    problem: PoolProblem, x: torch.Tensor, count_include_pad: bool, divisor_override: int | None
) -> torch.Tensor:
    """y [N, C, P, Q], channels_last if x [N, C, H, W] is; divided as torch.nn.functional.avg_pool2d does. No dilation."""
    return _average(problem, x, None, False, count_include_pad, divisor_override)


def avg_pool_backward(
    problem: PoolProblem,
    dy: torch.Tensor,
    count_include_pad: bool,
    divisor_override: int | None,
    memory_format: torch.memory_format,
) -> torch.Tensor:
    """dx [N, C, H, W] in `memory_format`, from dy [N, C, P, Q] in any layout."""
    return _average(problem, dy, memory_format, False, count_include_pad, divisor_override)


@launch.planned
def _adaptive_problem(x_shape, P: int, Q: int) -> PoolProblem:
    return PoolProblem(*x_shape, 1, 1, P, Q, 1, 1)


def adaptive_avg_pool(x: torch.Tensor, P: int, Q: int) -> torch.Tensor:
    """y [N, C, P, Q], channels_last if x [N, C, H, W] is: window p covers rows floor(p * H / P) to ceil((p + 1) * H /
    P).
    """
    return _average(_adaptive_problem(x.shape, P, Q), x, None, True)


def adaptive_avg_pool_backward(
    dy: torch.Tensor, x_shape: tuple[int, int, int, int], memory_format: torch.memory_format
) -> torch.Tensor:
    """dx of shape [N, C, H, W] = `x_shape` in `memory_format`, from dy [N, C, P, Q] in any layout."""
    if dy.numel() == 0:  # no windows
        return memory.empty(x_shape, dy, memory_format).zero_()
    return _average(_adaptive_problem(x_shape, *dy.shape[2:]), dy, memory_format, True)
