"""A convolution with what follows it, batch norm, addition and activation: operators of a whole layer.

Each is one node of autograd's graph, and they have one operator for their gradients, conv_bn_act_backward: first those
of the norm, then those of the convolution, each only if it is asked for. Who serves the convolution, our kernels or the
library, is asked in each of its three parts as everywhere (serving.py).

What a layer saves: x only for the gradient of w, and w only for that of x; y, the convolution's own result, where the
norm's gradients or the activation's argument are computed from it; beta, from which and y the activation is computed
again where there is no residual; with a residual the result z, which whoever comes next keeps anyway.

A gradient that may itself be differentiated is computed by the separate operators. y is an output of its layer, so
that the way from it back to x, w and bias is the layer's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import transformed
from . import conv_implementations as implementations
from .batchnorm import (
    dense_like,
    derivative_from_output,
    differentiable_gradients,
    fake_normalize_backward,
    kept_for_activation,
    kernel_gradients,
    no_gradient_of_prelu,
    normalize,
    update_running,
)
from .conv import conv_fprop, conv_stats, keep_packed, operand_gradients, save_operands
from .conv_implementations import GEOMETRY
from .registry import AS_ANYBODY, Calling, register

Gradients = list[Tensor | None]

# ----------------------------------------------------------------------------------------------------------------------
# What the operators do: they call others


def _training(
    calling: Calling,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """(z, y, own mean, own variance): act(batch_norm(y) + residual), y = conv(x, w) + bias.

    In training by y's own statistics, the biased variance; `mean` and `var` are the running ones, if there are any, and
    are updated. Else by `mean` and `var`. rest: from gamma to slopes, and GEOMETRY.
    """
    end, geometry = rest[:-5], rest[-5:]
    if not training:
        y = calling(conv_fprop)(x, w, bias, *geometry)
        return calling(normalize)(y, mean, var, *end, False), y, None, None
    y, *own = calling(conv_stats)(x, w, bias, *geometry)
    if mean is not None and y.shape[0]:  # an empty batch leaves them as they are
        calling(update_running)(mean, var, *own, momentum, y.shape[0] * y.shape[2] * y.shape[3])
    return calling(normalize)(y, *own, *end, True), y, *own


def _fake_training(x: Tensor, w: Tensor, bias, mean, var, training: bool, *rest: Any) -> tuple[Tensor, ...]:
    y, *own = implementations.fake_stats(x, w, bias, *rest[-5:])
    return dense_like(y), y, *(own if training else (x.new_empty(0), x.new_empty(0)))


def _backward(calling: Calling, *arguments: Any) -> tuple[Tensor | None, ...]:
    """(dx, dw, dbias, dgamma, dbeta, dresidual), None where not needed. Without an activation dresidual is dz itself,
    which nobody has to ask for.
    """
    of_norm, (x, w, packed, *layout, needs), geometry = arguments[:12], arguments[12:19], arguments[19:]
    dy, *of_channels = kernel_gradients(*of_norm, needs=(any(needs[:3]), *needs[3:]), calling=calling)
    of_operands = None, None, None
    if dy is not None:
        of_operands = operand_gradients(calling, dy, x, w, packed, *layout, needs, *geometry)
    return *of_operands, *of_channels


def _fake_backward(dz: Tensor, y: Tensor | None, z, mean, var, gamma, beta, *rest: Any) -> tuple[Tensor, ...]:
    x_shape, w_shape, channels_last, needs = rest[-9:-5]
    _, *of_channels = fake_normalize_backward(dz, y, z, mean, var, gamma, beta, (False, *needs[3:]))
    of_operands = (
        implementations.fake_dgrad(dz, dz, None, x_shape, channels_last) if needs[0] else dz.new_empty(0),
        implementations.fake_wgrad(dz, dz, w_shape, channels_last) if needs[1] else dz.new_empty(0),
        dz.new_empty(dz.shape[1] if needs[2] else 0),
    )
    return *of_operands, *of_channels


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


def _gradients(ctx: Any, dz: Tensor | None, dy: Tensor | None, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of x, w, bias, gamma, beta and residual, from that of z and, where y was differentiated too, of y."""
    x, w, packed, *of_norm = ctx.saved_tensors
    activation, again = ctx.options[1], torch.is_grad_enabled() or transformed()
    if dz is not None and dy is None and not (ctx.nothing or again):
        asked = *needs[:5], needs[5] and activation is not None
        grads: Gradients = [None] * 6
        if any(asked):
            how = *ctx.options, x, w, packed, *ctx.layout, asked, *ctx.geometry
            found = conv_bn_act_backward(dz, *of_norm, *how)
            grads = [grad if need else None for grad, need in zip(found, asked, strict=True)]
        if needs[5] and activation is None:
            grads[5] = dz
        return grads
    of_channels: Gradients = [None] * 3
    if dz is not None:
        gradients = differentiable_gradients if again else kernel_gradients
        more, *of_channels = gradients(dz, *of_norm, *ctx.options, needs=(any(needs[:3]), *needs[3:]))
        dy = more if dy is None or more is None else dy + more
    of_operands = None, None, None
    if dy is not None:
        of_operands = operand_gradients(AS_ANYBODY, dy, x, w, packed, *ctx.layout, needs, *ctx.geometry)
    return [*of_operands, *of_channels]


class _Training(torch.autograd.Function):
    """The form that leaves y. mean and var are constants to autograd: the gradient goes through them by itself."""

    @staticmethod
    def forward(ctx, x, w, bias, mean, var, training, momentum, gamma, beta, residual, *rest):
        (eps, activation, slope), geometry = rest[:3], rest[-5:]
        if activation == "prelu":
            raise no_gradient_of_prelu("conv_bn_act_training")
        ctx.geometry, ctx.options = geometry, (eps, activation, slope, training)
        ctx.set_materialize_grads(False)
        how = bias, mean, var, training, momentum, gamma, beta, residual, *rest
        (z, y, *own), packed = keep_packed(ctx, conv_bn_act_training, x, w, *how)
        if own[0] is not None:  # of frozen statistics the dispatcher makes empty ones
            ctx.mark_non_differentiable(*own)
        if training:
            mean, var = own
        *of_argument, of_z = kept_for_activation(z, True, beta, residual, activation, slope)
        needs = ctx.needs_input_grad
        again = activation is not None and of_z is None
        y_kept = y if again or needs[7] or (training and any(needs[:3])) else None
        save_operands(ctx, y, x, w, packed, y_kept, of_z, mean, var, gamma, *of_argument)
        return z, y, *own

    @staticmethod
    def backward(ctx, dz, dy, dmean, dvar):  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad
        dx, dw, dbias, *of_channels = _gradients(ctx, dz, dy, (*needs[:3], *needs[7:10]))
        return dx, dw, dbias, *[None] * 4, *of_channels, *[None] * 4, *[None] * len(ctx.geometry)


class _BnAct(torch.autograd.Function):
    """The fused form with frozen statistics and scale; its activation's derivative is read off its output."""

    @staticmethod
    def forward(ctx, x, w, bias, mean, var, gamma, beta, residual, eps, activation, slope, slopes, *geometry):
        if activation == "prelu":
            raise no_gradient_of_prelu("conv_bn_act")
        ctx.geometry, ctx.options = geometry, (eps, activation, slope, False)
        fused = bias, mean, var, gamma, beta, residual, eps, activation, slope, slopes
        z, packed = keep_packed(ctx, fused_bn_act, x, w, *fused, *geometry)
        save_operands(ctx, z, x, w, packed, None, z if activation else None, mean, var, gamma, None, None)
        return z

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad
        dx, dw, dbias, _, *ends = _gradients(ctx, dz, None, (*needs[:3], False, *needs[6:8]))
        return dx, dw, dbias, None, None, None, *ends, *[None] * 4, *[None] * len(ctx.geometry)


class _Act(torch.autograd.Function):
    """The fused form without a norm; its activation's derivative is read off its output. What is a norm's beta
    elsewhere is the bias here.
    """

    @staticmethod
    def forward(ctx, x, w, bias, residual, activation, slope, slopes, *geometry):
        if activation == "prelu":
            raise no_gradient_of_prelu("conv_act")
        ctx.geometry, ctx.options = geometry, (0.0, activation, slope, False)
        z, packed = keep_packed(ctx, _fused_act, x, w, bias, residual, activation, slope, slopes, *geometry)
        save_operands(ctx, z, x, w, packed, None, z if activation else None, None, None, None, None, None)
        return z

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad
        dx, dw, _, _, dbias, dresidual = _gradients(ctx, dz, None, (*needs[:2], False, False, *needs[2:4]))
        return dx, dw, dbias, dresidual, None, None, None, *[None] * len(ctx.geometry)


END = "Tensor? gamma, Tensor? beta, Tensor? residual, float eps, str? activation, float slope"
conv_bn_act_training = register(
    "conv_bn_act_training(Tensor x, Tensor w, Tensor? bias, Tensor(a!)? mean, Tensor(b!)? var, bool training,"
    f" float momentum, {END}, Tensor? slopes, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor)",
    _training,
    _fake_training,
    _Training,
    composed=True,
)
conv_bn_act_backward = register(
    f"conv_bn_act_backward(Tensor dz, Tensor? y, Tensor? z, Tensor? mean, Tensor? var, {END}, bool training, Tensor? x,"
    " Tensor? w, Tensor? packed, SymInt[4] x_shape, SymInt[4] w_shape, bool channels_last, bool[6] needs,"
    f" {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    composed=True,
)
fused_bn_act = register(
    f"conv_bn_act(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, {END}, Tensor? slopes, {GEOMETRY})"
    " -> Tensor",
    implementations.bn_act,
    implementations.fake_bn_act,
    _BnAct,
)
fused_bn_act_words = register(
    f"conv_bn_act_words(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, {END}, Tensor? slopes, {GEOMETRY})"
    " -> (Tensor, Tensor)",
    implementations.bn_act_words,
    implementations.fake_bn_act_words,
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
    end = gamma, beta, residual, eps, activation, slope, slopes
    if wants_grad and ((gamma is not None and gamma.requires_grad) or not derivative_from_output(activation, slope)):
        return conv_bn_act_training(x, w, bias, mean, var, False, 0.0, *end, *geometry)[0]
    return fused_bn_act(x, w, bias, mean, var, *end, *geometry)


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
