"""Convolution's operators and their derivatives. fprop, dgrad and wgrad are bilinear, and the derivatives of each are
the other two: derivatives of every order come from the three kernels.

`padding` is (top, bottom, left, right). A result and its gradients are laid out as PyTorch's are: all in one format,
which follows from the operands (convolution_format). Where a batch is empty, or there are no channels, there is nothing
to compute: gradients are zeros, laid out as the tensors they belong to.

Where kernels pack an image of few channels first (packing.py in cnnfast_kernels), a backward pass takes what the
forward pass packed: it is saved beside x. In a graph that torch.compile made each packs for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import memory, packing
from cnnfast_kernels.layout import convolution_format, is_channels_last, result_format

from . import conv_implementations as implementations
from . import plain
from .batchnorm import channel_sum
from .conv_implementations import GEOMETRY, memory_format
from .registry import AS_ANYBODY, Calling, register


def keep_packed(ctx: Any, operator: Any, x: Tensor, w: Tensor, *arguments: Any) -> tuple[Any, Tensor | None]:
    """What operator(x, w, *arguments) returns, and what it packed of x, if it did and the gradient of w can take it."""
    if w.shape[1] > packing.MOST_CHANNELS or not ctx.needs_input_grad[1]:
        return operator(x, w, *arguments), None
    with packing.keeping() as kept:
        result = operator(x, w, *arguments)
    return result, kept.packed


def save_operands(ctx: Any, y: Tensor, x: Tensor, w: Tensor, *more: Tensor | None) -> None:
    """Keeps x only if w wants a gradient, and the other way round, so that a frozen weight costs no memory. Where their
    result y is empty it keeps both: an empty x takes no memory, and the gradients are laid out as x and w are.

    ctx.layout is (shape of x, shape of w, whether their gradients are channels_last).
    """
    ctx.nothing = 0 in y.shape[:2]
    keep_x, keep_w = ctx.needs_input_grad[1] or ctx.nothing, ctx.needs_input_grad[0] or ctx.nothing
    ctx.save_for_backward(x if keep_x else None, w if keep_w else None, *more)
    ctx.layout = x.shape, w.shape, convolution_format(x, w) == torch.channels_last


def _zeros(
    x: Tensor, w: Tensor, biases: int, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, w and bias where there was nothing to compute, each only if asked for."""
    dx, dw = (torch.zeros_like(t) if wanted else None for t, wanted in ((x, needs[0]), (w, needs[1])))
    return dx, dw, x.new_zeros(biases) if needs[2] else None


def operand_gradients(
    calling: Calling,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    packed: Tensor | None,
    x_shape: Any,
    w_shape: Any,
    channels_last: bool,
    needs: Sequence[bool],
    *geometry: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w and bias, each only if `needs` asks for it. x, w: as save_operands kept them, with the layout
    that it noted; packed: of keep_packed.
    """
    if 0 in dy.shape[:2]:
        assert x is not None
        assert w is not None
        return _zeros(x, w, w_shape[0], needs)
    dx = calling(conv_dgrad)(dy, w, None, x_shape, channels_last, *geometry) if needs[0] else None
    dw = None
    if needs[1]:
        assert x is not None
        with nullcontext() if packed is None else packing.given(x, packed):
            dw = calling(conv_wgrad)(x, dy, w_shape, channels_last, *geometry)
    return dx, dw, calling(channel_sum)(dy) if needs[2] else None


def _transposed_grad(ctx: Any, ddx: Tensor, w: Tensor) -> Tensor:
    """The gradient of a transposed convolution's input, from that of its result. conv_fprop gives it the format of its
    own operands, which need not be the right one: then it is copied.
    """
    shape, _, channels_last = ctx.layout
    fmt = memory_format(channels_last)
    ddy = conv_fprop(ddx, w, None, *ctx.geometry)
    return ddy if result_format(ddy) == fmt else memory.empty(shape, ddy, fmt).copy_(ddy)


class _Fprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        ctx.geometry = geometry
        y, packed = keep_packed(ctx, conv_fprop, x, w, bias, *geometry)
        save_operands(ctx, y, x, w, packed)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = operand_gradients(AS_ANYBODY, dy, *ctx.saved_tensors, *ctx.layout, ctx.needs_input_grad, *ctx.geometry)
        return *grads, *[None] * len(ctx.geometry)


class _Dgrad(torch.autograd.Function):
    """Also a transposed convolution, to which `bias` belongs."""

    @staticmethod
    def forward(ctx, dy, w, bias, x_shape, channels_last, *geometry):
        ctx.geometry = geometry
        dx = conv_dgrad(dy, w, bias, x_shape, channels_last, *geometry)
        save_operands(ctx, dx, dy, w)
        return dx

    @staticmethod
    def backward(ctx, ddx):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, w = ctx.saved_tensors
        if ctx.nothing:
            return *_zeros(dy, w, ddx.shape[1], ctx.needs_input_grad), None, None, *[None] * len(ctx.geometry)
        ddy = _transposed_grad(ctx, ddx, w) if ctx.needs_input_grad[0] else None
        dw = conv_wgrad(ddx, dy, *ctx.layout[1:], *ctx.geometry) if ctx.needs_input_grad[1] else None
        return ddy, dw, channel_sum(ddx) if ctx.needs_input_grad[2] else None, None, None, *[None] * len(ctx.geometry)


class _Wgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dy, w_shape, channels_last, *geometry):
        ctx.geometry = geometry
        ctx.save_for_backward(x, dy)
        return conv_wgrad(x, dy, w_shape, channels_last, *geometry)

    @staticmethod
    def backward(ctx, ddw):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, dy = ctx.saved_tensors
        dx = conv_dgrad(dy, ddw, None, x.shape, is_channels_last(x), *ctx.geometry) if ctx.needs_input_grad[0] else None
        ddy = conv_fprop(x, ddw, None, *ctx.geometry) if ctx.needs_input_grad[1] else None
        return dx, ddy, None, None, *[None] * len(ctx.geometry)


class _Stats(torch.autograd.Function):
    """mean and var are constants to autograd: `normalize(training=True)`, their one reader, differentiates through them
    itself.
    """

    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        (y, mean, var), packed = keep_packed(ctx, conv_stats, x, w, bias, *geometry)
        save_operands(ctx, y, x, w, packed)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, dmean, dvar):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = None, None, None
        if dy is not None:
            grads = operand_gradients(
                AS_ANYBODY, dy, *ctx.saved_tensors, *ctx.layout, ctx.needs_input_grad, *ctx.geometry
            )
        return *grads, *[None] * len(ctx.geometry)


conv_fprop = register(
    f"conv_fprop(Tensor x, Tensor w, Tensor? bias, {GEOMETRY}) -> Tensor",
    implementations.fprop,
    implementations.fake_fprop,
    _Fprop,
    plain.conv_fprop,
)
conv_dgrad = register(
    f"conv_dgrad(Tensor dy, Tensor w, Tensor? bias, SymInt[4] x_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    implementations.dgrad,
    implementations.fake_dgrad,
    _Dgrad,
    plain.conv_dgrad,
)
conv_dgrad_below = register(
    "conv_dgrad_below(Tensor dy, Tensor w, Tensor? residual, Tensor? y, Tensor? words, Tensor? mean, Tensor? var,"
    " Tensor? gamma, Tensor? beta, float eps, str? activation, float slope, SymInt[4] x_shape, bool channels_last,"
    f" {GEOMETRY}) -> (Tensor, Tensor, Tensor)",
    implementations.dgrad_below,
    implementations.fake_dgrad_below,
)
conv_wgrad = register(
    f"conv_wgrad(Tensor x, Tensor dy, SymInt[4] w_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    implementations.wgrad,
    implementations.fake_wgrad,
    _Wgrad,
    plain.conv_wgrad,
)
conv_stats = register(
    f"conv_stats(Tensor x, Tensor w, Tensor? bias, {GEOMETRY}) -> (Tensor, Tensor, Tensor)",
    implementations.stats,
    implementations.fake_stats,
    _Stats,
)
