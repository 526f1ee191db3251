"""Convolution's operators. fprop, dgrad and wgrad are bilinear, and the derivatives of each are the other two:
derivatives of every order come from the three kernels.

`padding` is (top, bottom, left, right). A result and its gradients are laid out as PyTorch's are: all in one format,
which follows from the operands (convolution_format). Of an empty batch, and without channels, there is nothing
to compute: gradients are zeros, laid out as the tensors they belong to.

With algorithm="auto" serving.py decides whether the library's convolution serves (library.py) or our kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import conv, memory
from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.epilogue import FROM_OUTPUT, PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.layout import convolution_format, is_channels_last, result_format
from cnnfast_kernels.problem import output_extent

from ..precision import allow_tf32
from . import library, plain, serving
from .batchnorm import channel_sum, frozen_backward, normalize
from .registry import register

GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, int groups, str algorithm"


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fprop(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, algorithm) -> Tensor:
    if x.shape[1] == 0:
        return _fake_fprop(x, w, bias, stride, padding, dilation, groups, algorithm)
    geometry, tf32 = conv.Geometry(stride, padding, dilation, groups), allow_tf32(x)
    if serving.asked(algorithm, x) and (decision := serving.fprop(x, w, geometry, tf32)):
        return library.fprop(x, w, geometry, bias, decision)
    return conv.conv_fprop(x, w, geometry, PLAIN if bias is None else Epilogue(bias), algorithm=algorithm, tf32=tf32)


def _dgrad(
    dy: Tensor, w: Tensor, bias: Tensor | None, x_shape, channels_last, stride, padding, dilation, groups, algorithm
) -> Tensor:
    geometry, tf32, fmt = conv.Geometry(stride, padding, dilation, groups), allow_tf32(dy), _format(channels_last)
    if serving.asked(algorithm, dy) and (decision := serving.dgrad(dy, w, x_shape, fmt, geometry, tf32)):
        return library.dgrad(dy, w, x_shape, geometry, bias, decision)
    return conv.conv_dgrad(dy, w, x_shape, geometry, bias=bias, fmt=fmt, algorithm=algorithm, tf32=tf32)


def _wgrad(x: Tensor, dy: Tensor, w_shape, channels_last, stride, padding, dilation, groups, algorithm) -> Tensor:
    geometry, tf32, fmt = conv.Geometry(stride, padding, dilation, groups), allow_tf32(x), _format(channels_last)
    if serving.asked(algorithm, x) and (decision := serving.wgrad(x, dy, w_shape, fmt, geometry, tf32)):
        return library.wgrad(x, dy, w_shape, geometry, decision)
    return conv.conv_wgrad(x, dy, w_shape, geometry, fmt=fmt, algorithm=algorithm, tf32=tf32)


def _stats(
    x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, algorithm
) -> tuple[Tensor, Tensor, Tensor]:
    geometry, tf32 = conv.Geometry(stride, padding, dilation, groups), allow_tf32(x)
    if serving.asked(algorithm, x) and (decision := serving.fprop(x, w, geometry, tf32, "stats")):
        return library.stats(x, w, geometry, bias, decision)
    return conv.conv_stats(x, w, geometry, bias=bias, algorithm=algorithm, tf32=tf32)


def _bn_act(
    x: Tensor,
    w: Tensor,
    bias,
    mean,
    var,
    bn_weight,
    bn_bias,
    residual,
    eps,
    activation,
    slope,
    stride,
    padding,
    dilation,
    groups,
    algorithm,
) -> Tensor:
    geometry, tf32 = conv.Geometry(stride, padding, dilation, groups), allow_tf32(x)
    epilogue = Epilogue(bias, BatchNorm(mean, var, bn_weight, bn_bias, eps), residual, activation, slope)
    if serving.asked(algorithm, x) and (decision := serving.fprop(x, w, geometry, tf32, "norm", residual, activation)):
        return library.bn_act(x, w, geometry, epilogue, decision)
    return conv.conv_fprop(x, w, geometry, epilogue, algorithm=algorithm, tf32=tf32)


def _fake_output(x: Tensor, w: Tensor, stride, padding, dilation, filters: int | None = None) -> Tensor:
    P = output_extent(x.shape[2], w.shape[2], stride[0], padding[0], padding[1], dilation[0])
    Q = output_extent(x.shape[3], w.shape[3], stride[1], padding[2], padding[3], dilation[1])
    K = w.shape[0] if filters is None else filters
    return memory.empty((x.shape[0], K, P, Q), x, convolution_format(x, w))


def _fake_fprop(x: Tensor, w: Tensor, bias, stride, padding, dilation, groups, algorithm) -> Tensor:
    """As PyTorch has it, without channels in there are none out."""
    return _fake_output(x, w, stride, padding, dilation, 0 if x.shape[1] == 0 else None)


def _fake_dgrad(dy: Tensor, w: Tensor, bias, x_shape, channels_last, *geometry: Any) -> Tensor:
    return memory.empty(x_shape, dy, _format(channels_last))


def _fake_wgrad(x: Tensor, dy: Tensor, w_shape, channels_last, *geometry: Any) -> Tensor:
    return memory.empty(w_shape, x, _format(channels_last))


def _fake_stats(
    x: Tensor, w: Tensor, bias, stride, padding, dilation, groups, algorithm
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(w.shape[0], dtype=accumulator_dtype(x.dtype))
    return _fake_output(x, w, stride, padding, dilation), statistic, torch.empty_like(statistic)


def _fake_bn_act(
    x: Tensor,
    w: Tensor,
    bias,
    mean,
    var,
    bn_weight,
    bn_bias,
    residual,
    eps,
    activation,
    slope,
    stride,
    padding,
    dilation,
    groups,
    algorithm,
) -> Tensor:
    return _fake_output(x, w, stride, padding, dilation)


def _save_operands(ctx: Any, y: Tensor, x: Tensor, w: Tensor, *more: Tensor | None) -> None:
    """x is kept only if w wants a gradient, and the other way round: a frozen weight costs no memory. Where there was
    nothing to compute of their result y, both are: an empty x takes no memory either.
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


def _operand_grads(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w and bias, each only if asked for."""
    if ctx.nothing:
        return _zeros(ctx, x, w, w.shape[0])
    needs = ctx.needs_input_grad
    dx = conv_dgrad(dy, w, None, *ctx.x_layout, *ctx.geometry) if needs[0] else None
    dw = conv_wgrad(x, dy, *ctx.w_layout, *ctx.geometry) if needs[1] else None
    return dx, dw, channel_sum(dy) if needs[2] else None


def _transposed_grad(ctx: Any, ddx: Tensor, w: Tensor) -> Tensor:
    """The gradient of what a transposed convolution took, from its result's: copied where conv_fprop gave it the format
    of its operands.
    """
    shape, channels_last = ctx.x_layout
    fmt = _format(channels_last)
    ddy = conv_fprop(ddx, w, None, *ctx.geometry)
    return ddy if result_format(ddy) == fmt else memory.empty(shape, ddy, fmt).copy_(ddy)


class _Fprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, *geometry):
        ctx.geometry = geometry
        y = conv_fprop(x, w, bias, *geometry)
        _save_operands(ctx, y, x, w)
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
        y, mean, var = conv_stats(x, w, bias, *geometry)
        _save_operands(ctx, y, x, w)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, dmean, dvar):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = (None, None, None) if dy is None else _operand_grads(ctx, dy, *ctx.saved_tensors)
        return *grads, *[None] * len(ctx.geometry)


class _BnAct(torch.autograd.Function):
    """The fused form with frozen statistics and scale; its activation's derivative is read off its output."""

    @staticmethod
    def forward(ctx, x, w, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, slope, *geometry):
        ctx.geometry = geometry
        ctx.norm = eps, activation, slope
        z = _fused_bn_act(x, w, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, slope, *geometry)
        _save_operands(ctx, z, x, w, z if activation else None, mean, var, bn_weight)
        return z

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, z, mean, var, bn_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy, dbn_bias, dresidual = frozen_backward(
            dz, z, mean, var, bn_weight, *ctx.norm, needs=(any(needs[:3]), needs[6], needs[7])
        )
        grads = (None, None, None) if dy is None else _operand_grads(ctx, dy, x, w)
        return *grads, None, None, None, dbn_bias, dresidual, None, None, None, *[None] * len(ctx.geometry)


conv_fprop = register(
    f"conv_fprop(Tensor x, Tensor w, Tensor? bias, {GEOMETRY}) -> Tensor", _fprop, _fake_fprop, _Fprop, plain.conv_fprop
)
conv_dgrad = register(
    f"conv_dgrad(Tensor dy, Tensor w, Tensor? bias, SymInt[4] x_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    _dgrad,
    _fake_dgrad,
    _Dgrad,
    plain.conv_dgrad,
)
conv_wgrad = register(
    f"conv_wgrad(Tensor x, Tensor dy, SymInt[4] w_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    _wgrad,
    _fake_wgrad,
    _Wgrad,
    plain.conv_wgrad,
)
conv_stats = register(
    f"conv_stats(Tensor x, Tensor w, Tensor? bias, {GEOMETRY}) -> (Tensor, Tensor, Tensor)", _stats, _fake_stats, _Stats
)
_fused_bn_act = register(
    "conv_bn_act(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, Tensor? residual,"
    f" float eps, str? activation, float slope, {GEOMETRY}) -> Tensor",
    _bn_act,
    _fake_bn_act,
    _BnAct,
)


def conv_bn_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    *geometry: Any,
) -> Tensor:
    """act(batch_norm(conv(x, w) + bias) + residual) with given statistics: one kernel, unless a gradient needs what
    that one does not store, namely the convolution's own output (bn_weight wants a gradient) or what the activation was
    applied to (gelu and the like).
    """
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w, bias, bn_weight, bn_bias, residual)
    )
    from_output = activation in FROM_OUTPUT and not (activation == "leaky_relu" and slope <= 0)
    if wants_grad and (not from_output or (bn_weight is not None and bn_weight.requires_grad)):
        y = conv_fprop(x, w, bias, *geometry)
        return normalize(y, mean, var, bn_weight, bn_bias, residual, eps, activation, slope, False)
    return _fused_bn_act(x, w, bias, mean, var, bn_weight, bn_bias, residual, eps, activation, slope, *geometry)
