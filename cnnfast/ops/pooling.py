"""Pooling's operators. The adjoint of an average is an average's backward and the other way round; max pooling's
backward is linear in dy once the winning taps are known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import launch, memory, pooling
from cnnfast_kernels.layout import is_channels_last, result_format
from cnnfast_kernels.problem import PoolProblem

from . import plain
from .registry import register

WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"
AVERAGE = (
    "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override"
)


_problem = launch.planned(PoolProblem.of)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _layout(x: Tensor) -> tuple[torch.Size, bool]:
    return x.shape, is_channels_last(x)


def _max(x: Tensor, with_taps: bool, *window: Any) -> tuple[Tensor, Tensor]:
    y, taps = pooling.max_pool(_problem(x.shape, *window), x, with_taps)
    return y, y.new_empty(0, dtype=torch.uint8) if taps is None else taps


def _max_indices(taps: Tensor, x_shape, *window: Any) -> Tensor:
    return pooling.max_pool_indices(_problem(x_shape, *window), taps)


def _max_backward(dy: Tensor, taps: Tensor, x_shape, channels_last: bool, *window: Any) -> Tensor:
    return pooling.max_pool_backward(_problem(x_shape, *window), dy, taps, _format(channels_last))


def _average(x: Tensor, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override) -> Tensor:
    return pooling.avg_pool(
        _problem(x.shape, kernel_size, stride, padding, (1, 1), ceil_mode), x, count_include_pad, divisor_override
    )


def _average_backward(
    dy: Tensor, x_shape, channels_last, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
) -> Tensor:
    problem = _problem(x_shape, kernel_size, stride, padding, (1, 1), ceil_mode)
    return pooling.avg_pool_backward(problem, dy, count_include_pad, divisor_override, _format(channels_last))


def _adaptive(x: Tensor, output_size) -> Tensor:
    return pooling.adaptive_avg_pool(x, *output_size)


def _adaptive_backward(dy: Tensor, x_shape, channels_last: bool) -> Tensor:
    return pooling.adaptive_avg_pool_backward(dy, x_shape, _format(channels_last))


def _fake_problem(x_shape, kernel_size, stride, padding, dilation, ceil_mode) -> PoolProblem:
    # of extents without a value, perhaps
    return PoolProblem.of(x_shape, kernel_size, stride, padding, dilation, ceil_mode)


def _fake_pooled(x: Tensor, problem: PoolProblem, dtype: torch.dtype | None = None) -> Tensor:
    return memory.empty((problem.N, problem.C, problem.P, problem.Q), x, result_format(x), dtype)


def fake_max(x: Tensor, with_taps: bool, *window: Any) -> tuple[Tensor, Tensor]:
    problem = _fake_problem(x.shape, *window)
    taps = _fake_pooled(x, problem, pooling.taps_dtype(problem)) if with_taps else x.new_empty(0, dtype=torch.uint8)
    return _fake_pooled(x, problem), taps


def _fake_average(x: Tensor, kernel_size, stride, padding, ceil_mode, *divisor: Any) -> Tensor:
    return _fake_pooled(x, _fake_problem(x.shape, kernel_size, stride, padding, (1, 1), ceil_mode))


def _fake_backward(dy: Tensor, x_shape, channels_last: bool, *options: Any) -> Tensor:
    return memory.empty(x_shape, dy, _format(channels_last))


def _fake_adaptive(x: Tensor, output_size) -> Tensor:
    return memory.empty((*x.shape[:2], *output_size), x, result_format(x))


def _fake_global(x: Tensor) -> Tensor:
    return _fake_adaptive(x, (1, 1))


class _Max(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, with_taps, *window):
        y, taps = max_pool(x, True, *window)
        ctx.save_for_backward(taps)
        ctx.layout, ctx.window = _layout(x), window
        ctx.mark_non_differentiable(taps)
        ctx.set_materialize_grads(False)
        return y, taps

    @staticmethod
    def backward(ctx, dy, dtaps):  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = None if dy is None else max_pool_backward(dy, *ctx.saved_tensors, *ctx.layout, *ctx.window)
        return dx, None, *[None] * len(ctx.window)


class _MaxBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, taps, x_shape, channels_last, *window):
        ctx.save_for_backward(taps)
        ctx.window = window
        return max_pool_backward(dy, taps, x_shape, channels_last, *window)

    @staticmethod
    def backward(ctx, ddx):  # pyright: ignore[reportIncompatibleMethodOverride]
        (taps,) = ctx.saved_tensors
        winners = max_pool_indices(taps, ddx.shape, *ctx.window)
        N, C, H, W = ddx.shape
        ddy = ddx.reshape(N, C, H * W).gather(2, winners.flatten(2)).view(winners.shape)
        return ddy, None, None, None, *[None] * len(ctx.window)


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *options):
        ctx.layout, ctx.options = _layout(x), options
        return avg_pool(x, *options)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return avg_pool_backward(dy, *ctx.layout, *ctx.options), *[None] * len(ctx.options)


class _AverageBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x_shape, channels_last, *options):
        ctx.options = options
        return avg_pool_backward(dy, x_shape, channels_last, *options)

    @staticmethod
    def backward(ctx, ddx):  # pyright: ignore[reportIncompatibleMethodOverride]
        return avg_pool(ddx, *ctx.options), None, None, *[None] * len(ctx.options)


class _Adaptive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, output_size):
        ctx.layout = _layout(x)
        return adaptive_avg_pool(x, output_size)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        if 0 in dy.shape[1:]:
            raise RuntimeError(
                f"adaptive_avg_pool2d(): a result of size {list(dy.shape)} has no gradient, as in PyTorch: only "
                f"the batch may be empty"
            )
        return adaptive_avg_pool_backward(dy, *ctx.layout), None


class _Global(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.layout = _layout(x)
        return global_avg_pool(x)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return adaptive_avg_pool_backward(dy, *ctx.layout)


class _AdaptiveBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x_shape, channels_last):
        ctx.output_size = dy.shape[2:]
        return adaptive_avg_pool_backward(dy, x_shape, channels_last)

    @staticmethod
    def backward(ctx, ddx):  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = tuple(ctx.output_size) == (1, 1)
        return global_avg_pool(ddx) if whole else adaptive_avg_pool(ddx, ctx.output_size), None, None


max_pool = register(f"max_pool(Tensor x, bool with_taps, {WINDOW}) -> (Tensor, Tensor)", _max, fake_max, _Max)
max_pool_indices = register(
    f"max_pool_indices(Tensor taps, SymInt[4] x_shape, {WINDOW}) -> Tensor",
    _max_indices,
    lambda taps, x_shape, *window: torch.empty_like(taps, dtype=torch.int64),
)
max_pool_backward = register(
    f"max_pool_backward(Tensor dy, Tensor taps, SymInt[4] x_shape, bool channels_last, {WINDOW}) -> Tensor",
    _max_backward,
    lambda dy, taps, *rest: _fake_backward(dy, *rest),
    _MaxBackward,
    lambda dy, taps, x_shape, channels_last, *window: plain.max_pool_backward(
        dy, max_pool_indices(taps, x_shape, *window), x_shape
    ),
)
avg_pool = register(f"avg_pool(Tensor x, {AVERAGE}) -> Tensor", _average, _fake_average, _Average, plain.avg_pool)
avg_pool_backward = register(
    f"avg_pool_backward(Tensor dy, SymInt[4] x_shape, bool channels_last, {AVERAGE}) -> Tensor",
    _average_backward,
    _fake_backward,
    _AverageBackward,
    plain.avg_pool_backward,
)
global_avg_pool = register(
    "global_avg_pool(Tensor x) -> Tensor", pooling.global_avg_pool, _fake_global, _Global, plain.global_avg_pool
)
adaptive_avg_pool = register(
    "adaptive_avg_pool(Tensor x, SymInt[2] output_size) -> Tensor",
    _adaptive,
    _fake_adaptive,
    _Adaptive,
    plain.adaptive_avg_pool,
)
adaptive_avg_pool_backward = register(
    "adaptive_avg_pool_backward(Tensor dy, SymInt[4] x_shape, bool channels_last) -> Tensor",
    _adaptive_backward,
    _fake_backward,
    _AdaptiveBackward,
    plain.adaptive_avg_pool_backward,
)
