"""Convolution's operators and their derivatives. fprop, dgrad and wgrad are bilinear, and the derivatives of each are
the other two: derivatives of every order come from the three kernels.

`padding` is (top, bottom, left, right). A result and its gradients are laid out as PyTorch's are: all in one format,
which follows from the operands (convolution_format). Where a batch is empty, or there are no channels, there is nothing
to compute: gradients are zeros, laid out as the tensors they belong to.

Where kernels pack an image of few channels first (packing.py in cnnfast_kernels), a backward pass takes what the
forward pass packed: it is saved beside x. In a graph that torch.compile made each packs for itself.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import memory, packing
from cnnfast_kernels.layout import convolution_format, is_channels_last, result_format

from . import conv_implementations as implementations
from . import plain
from .batchnorm import channel_sum, derivative_from_output, frozen_backward, no_gradient_of_prelu, normalize
from .conv_implementations import GEOMETRY, memory_format
from .registry import register


def _keep_packed(ctx: Any, operator: Any, x: Tensor, w: Tensor, *arguments: Any) -> tuple[Any, Tensor | None]:
    """What operator(x, w, *arguments) returns, and what it packed of x, if it did and the gradient of w can take it."""
    if w.shape[1] > packing.MOST_CHANNELS or not ctx.needs_input_grad[1]:
        return operator(x, w, *arguments), None
    with packing.keeping() as kept:
        result = operator(x, w, *arguments)
    return result, kept.packed


def _save_operands(ctx: Any, y: Tensor, x: Tensor, w: Tensor, *more: Tensor | None) -> None:
    """Keeps x only if w wants a gradient, and the other way round, so that a frozen weight costs no memory. Where their
    result y is empty it keeps both: an empty x takes no memory, and the gradients are laid out as x and w are.
    """
    ctx.nothing = 0 in y.shape[:2]
    keep_x, keep_w = ctx.needs_input_grad[1] or ctx.nothing, ctx.needs_input_grad[0] or ctx.nothing
    ctx.save_for_backward(x if keep_x else None, w if keep_w else None, *more)
    channels_last = convolution_format(x, w) == torch.channels_last
    ctx.x_layout = x.shape, channels_last
    ctx.w_layout = w.shape, channels_last


def _zeros(ctx: Any, x: Tensor, w: Tensor, biases: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, w and bias where there was nothing to compute, each only if asked for."""
    needs = ctx.needs_input_grad
    dx, dw = (torch.zeros_like(t) if wanted else None for t, wanted in ((x, needs[0]), (w, needs[1])))
    return dx, dw, x.new_zeros(biases) if needs[2] else None


def _operand_grads(
    ctx: Any, dy: Tensor, x: Tensor, w: Tensor, packed: Tensor | None, with_bias: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w and, if it is not computed elsewhere, bias, each only if asked for. packed: of _keep_packed."""
    if ctx.nothing:
        return _zeros(ctx, x, w, w.shape[0])
    needs = ctx.needs_input_grad
    dx = conv_dgrad(dy, w, None, *ctx.x_layout, *ctx.geometry) if needs[0] else None
    dw = None
    if needs[1]:
        with nullcontext() if packed is None else packing.given(x, packed):
            dw = conv_wgrad(x, dy, *ctx.w_layout, *ctx.geometry)
    return dx, dw, channel_sum(dy) if with_bias and needs[2] else None


def _transposed_grad(ctx: Any, ddx: Tensor, w: Tensor) -> Tensor:
    """The gradient of a transposed convolution's input, from that of its result. conv_fprop gives it the format of its
    own operands, which need not be the right one: then it is copied.
    """
    shape, channels_last = ctx.x_layout
    fmt = memory_format(channels_last)
    ddy = conv_fprop(ddx, w, None, *ctx.geometry)
    return ddy if result_format(ddy) == fmt else memory.empty(shape, ddy, fmt).copy_(ddy)


class _Fprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        ctx.geometry = geometry
        y, packed = _keep_packed(ctx, conv_fprop, x, w, bias, *geometry)
        _save_operands(ctx, y, x, w, packed)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_operand_grads(ctx, dy, *ctx.saved_tensors), *[None] * len(ctx.geometry)


class _Dgrad(torch.autograd.Function):
    """Also a transposed convolution, to which `bias` belongs."""

    @staticmethod
    def forward(ctx, dy, w, bias, x_shape, channels_last, *geometry):
        ctx.geometry = geometry
        dx = conv_dgrad(dy, w, bias, x_shape, channels_last, *geometry)
        _save_operands(ctx, dx, dy, w)
        return dx

    @staticmethod
    def backward(ctx, ddx):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, w = ctx.saved_tensors
        if ctx.nothing:
            return *_zeros(ctx, dy, w, ddx.shape[1]), None, None, *[None] * len(ctx.geometry)
        ddy = _transposed_grad(ctx, ddx, w) if ctx.needs_input_grad[0] else None
        dw = conv_wgrad(ddx, dy, *ctx.w_layout, *ctx.geometry) if ctx.needs_input_grad[1] else None
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
        (y, mean, var), packed = _keep_packed(ctx, conv_stats, x, w, bias, *geometry)
        _save_operands(ctx, y, x, w, packed)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, dmean, dvar):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = (None, None, None) if dy is None else _operand_grads(ctx, dy, *ctx.saved_tensors)
        return *grads, *[None] * len(ctx.geometry)


class _BnAct(torch.autograd.Function):
    """The fused form with frozen statistics and scale; its activation's derivative is read off its output."""

    @staticmethod
    def forward(ctx, x, w, bias, mean, var, gamma, beta, residual, eps, activation, slope, slopes, *geometry):
        if activation == "prelu":
            raise no_gradient_of_prelu("conv_bn_act")
        ctx.geometry = geometry
        ctx.norm = eps, activation, slope
        fused = bias, mean, var, gamma, beta, residual, eps, activation, slope, slopes
        z, packed = _keep_packed(ctx, _fused_bn_act, x, w, *fused, *geometry)
        _save_operands(ctx, z, x, w, packed, z if activation else None, mean, var, gamma)
        return z

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, packed, z, mean, var, gamma = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_output = any(needs[:3]), needs[6], needs[7]
        dy, dbeta, dresidual = frozen_backward(dz, z, mean, var, gamma, *ctx.norm, needs=of_output)
        grads = (None, None, None) if dy is None else _operand_grads(ctx, dy, x, w, packed)
        return *grads, None, None, None, dbeta, dresidual, *[None] * 4, *[None] * len(ctx.geometry)


class _Act(torch.autograd.Function):
    """The fused form without a norm; its activation's derivative is read off its output."""

    @staticmethod
    def forward(ctx, x, w, bias, residual, activation, slope, slopes, *geometry):
        if activation == "prelu":
            raise no_gradient_of_prelu("conv_act")
        ctx.geometry = geometry
        ctx.activation = activation, slope
        z, packed = _keep_packed(ctx, _fused_act, x, w, bias, residual, activation, slope, slopes, *geometry)
        _save_operands(ctx, z, x, w, packed, z if activation else None)
        return z

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, packed, z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = any(needs[:2]), needs[2], needs[3]
        dy, dbias, dresidual = frozen_backward(dz, z, None, None, None, 0.0, *ctx.activation, needs=wanted)
        dx, dw = (None, None) if dy is None else _operand_grads(ctx, dy, x, w, packed, with_bias=False)[:2]
        return dx, dw, dbias, dresidual, None, None, None, *[None] * len(ctx.geometry)


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
_fused_bn_act = register(
    "conv_bn_act(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta,"
    f" Tensor? residual, float eps, str? activation, float slope, Tensor? slopes, {GEOMETRY}) -> Tensor",
    implementations.bn_act,
    implementations.fake_bn_act,
    _BnAct,
)
_fused_act = register(
    "conv_act(Tensor x, Tensor w, Tensor? bias, Tensor? residual, str? activation, float slope, Tensor? slopes,"
    f" {GEOMETRY}) -> Tensor",
    implementations.act,
    implementations.fake_bn_act,
    _Act,
)


def conv_bn_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    slopes: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """act(batch_norm(conv(x, w) + bias) + residual) with given statistics.

    That is one kernel, unless a gradient needs what this kernel does not store: the convolution's own output, where
    gamma wants a gradient, or what the activation was applied to, as gelu and others do.
    """
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w, bias, gamma, beta, residual)
    )
    if wants_grad and ((gamma is not None and gamma.requires_grad) or not derivative_from_output(activation, slope)):
        y = conv_fprop(x, w, bias, *geometry)
        return normalize(y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, False)
    return _fused_bn_act(x, w, bias, mean, var, gamma, beta, residual, eps, activation, slope, slopes, *geometry)


def conv_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    slope: float,
    slopes: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """act(conv(x, w) + bias + residual).

    That is one kernel, unless a gradient needs what the activation was applied to, as gelu's and others' do. Then the
    convolution's output is stored, and bias, residual and activation are a pass of their own, which computes its
    argument again in backward.
    """
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, bias, residual))
    if wants_grad and not derivative_from_output(activation, slope):
        y = conv_fprop(x, w, None, *geometry)
        return normalize(y, None, None, None, bias, residual, 0.0, activation, slope, slopes, False)
    return _fused_act(x, w, bias, residual, activation, slope, slopes, *geometry)
