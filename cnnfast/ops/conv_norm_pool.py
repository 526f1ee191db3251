"""A convolution with its batch norm in training, an activation and a max pool: the stem of a network as one operator.

The tensor between the activation and the pool, the largest of many networks, is never written: a pass normalises,
activates and pools what the convolution gave (y), and leaves the tap of each maximum and y at it. A gradient of the
result goes to one pixel of y alone, so that the sums of the norm's gradients go over the pixels of the result.

What it saves: x only for the gradient of w, and w only for that of x; y and the taps where any of the two, or the bias,
wants a gradient; y at the maxima. An image that the kernels packed is packed again in backward: kept, it would be as
large as y at the maxima, and a pass over an image of few channels is short. Activations are those whose derivative is
told from their output, and windows are not dilated and of at most 255 taps: the functions see to that.

A gradient that may itself be differentiated is computed by the separate operators, as conv_norm.py has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import batchnorm, launch, pooling
from cnnfast_kernels.layout import is_channels_last
from cnnfast_kernels.problem import PoolProblem

from ..dispatch import transformed
from . import conv_implementations as implementations
from .batchnorm import dense_like, differentiable_gradients, kernel_gradients, update_running
from .conv import conv_stats, operand_gradients, save_operands
from .conv_implementations import GEOMETRY
from .pooling import fake_max, max_pool_backward
from .registry import AS_ANYBODY, Calling, register

# The positions of a norm and an activation, and of a window without dilation.
NORM = "Tensor? gamma, Tensor? beta, float eps, str? activation, float slope"
WINDOW = "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode"

_problem = launch.planned(PoolProblem.of)


def _window(size, stride, padding, ceil_mode) -> tuple[Any, ...]:
    """The positions of max_pool's window."""
    return size, stride, padding, (1, 1), ceil_mode


# ----------------------------------------------------------------------------------------------------------------------
# The pass that pools, and that of its gradient


def _pool(
    y: Tensor, mean: Tensor, var: Tensor, gamma, beta, eps, activation, slope, *window: Any
) -> tuple[Tensor, ...]:
    problem = _problem(y.shape, *_window(*window))
    return pooling.normalised_max_pool(problem, y, mean, var, gamma, beta, eps, activation, slope)


def _fake_pool(y: Tensor, mean, var, gamma, beta, eps, activation, slope, *window: Any) -> tuple[Tensor, ...]:
    z, taps = fake_max(y, True, *_window(*window))
    return z, taps, torch.empty_like(z)


def _pool_backward(
    dz: Tensor, taps, at_max: Tensor, y, mean, var, gamma, beta, eps, activation, slope, *rest: Any
) -> tuple[Tensor, ...]:
    *window, needs = rest
    sums = batchnorm.gradient_sums(dz, at_max, None, mean, var, gamma, beta, None, eps, activation, slope)
    dy = dz.new_empty(0)
    if needs[0]:
        problem = _problem(y.shape, *_window(*window))
        norm = mean, var, gamma, beta, sums, eps, activation, slope
        dy = pooling.normalised_max_pool_backward(problem, dz, taps, y, *norm)
    # results of an operator share no memory
    of_channels = (
        sums[i].to((mean if t is None else t).dtype, copy=True) if need else dz.new_empty(0)
        for i, t, need in ((1, gamma, needs[1]), (0, beta, needs[2]))
    )
    return dy, *of_channels


def _fake_pool_backward(
    dz: Tensor, taps, at_max, y, mean: Tensor, var, gamma: Tensor | None, beta: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    of_channels = (
        torch.empty_like(mean, dtype=(mean if t is None else t).dtype) if need else dz.new_empty(0)
        for t, need in ((gamma, needs[1]), (beta, needs[2]))
    )
    return dense_like(y) if needs[0] else dz.new_empty(0), *of_channels


normalize_max_pool = register(
    f"normalize_max_pool(Tensor y, Tensor mean, Tensor var, {NORM}, {WINDOW}) -> (Tensor, Tensor, Tensor)",
    _pool,
    _fake_pool,
)
normalize_max_pool_backward = register(
    "normalize_max_pool_backward(Tensor dz, Tensor? taps, Tensor at_max, Tensor? y, Tensor mean, Tensor var,"
    f" {NORM}, {WINDOW}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _pool_backward,
    _fake_pool_backward,
)

# ----------------------------------------------------------------------------------------------------------------------
# The whole


def _training(
    calling: Calling, x: Tensor, w: Tensor, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """(z, y, taps, y at the maxima, own mean, own variance) of y = conv(x, w) + bias and z = max_pool(act(bn(y))).

    `mean` and `var` are the running statistics, if there are any, and are updated. rest: the momentum, NORM, WINDOW and
    GEOMETRY.
    """
    momentum, of_pass, geometry = rest[0], rest[1:-5], rest[-5:]
    y, *own = calling(conv_stats)(x, w, bias, *geometry)
    if mean is not None and y.shape[0]:  # an empty batch leaves them as they are
        calling(update_running)(mean, var, *own, momentum, y.shape[0] * y.shape[2] * y.shape[3])
    z, *found = calling(normalize_max_pool)(y, *own, *of_pass)
    return z, y, *found, *own


def _fake_training(x: Tensor, w: Tensor, bias, mean, var, *rest: Any) -> tuple[Tensor, ...]:
    y, *own = implementations.fake_stats(x, w, bias, *rest[-5:])
    z, *found = _fake_pool(y, *own, *rest[1:-5])
    return z, y, *found, *own


def _backward(calling: Calling, *arguments: Any) -> tuple[Tensor | None, ...]:
    """(dx, dw, dbias, dgamma, dbeta), None where not needed."""
    of_pass, (x, w, *layout, needs), geometry = arguments[:15], arguments[15:21], arguments[21:]
    wanted = any(needs[:3]), *needs[3:]
    dy, *of_channels = calling(normalize_max_pool_backward)(*of_pass, wanted)
    of_operands = None, None, None
    if wanted[0]:
        of_operands = operand_gradients(calling, dy, x, w, None, *layout, needs, *geometry)
    return *of_operands, *of_channels


def _fake_backward(dz: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x_shape, w_shape, channels_last, needs = rest[16:20]
    _, *of_channels = _fake_pool_backward(dz, *rest[:14], (False, *needs[3:]))
    of_operands = (
        implementations.fake_dgrad(dz, dz, None, x_shape, channels_last) if needs[0] else dz.new_empty(0),
        implementations.fake_wgrad(dz, dz, w_shape, channels_last) if needs[1] else dz.new_empty(0),
        dz.new_empty(dz.shape[1] if needs[2] else 0),
    )
    return *of_operands, *of_channels


def _by_separate_operators(
    ctx: Any, dz: Tensor | None, dy: Tensor | None, needs: tuple[bool, ...], again: bool
) -> list[Tensor | None]:
    """The gradients where they may be differentiated themselves, where y was differentiated too, and of no pixels.

    Where y was not kept, because nobody it is computed from wants a gradient, its pixels beyond the maxima have no part
    in those of gamma and beta: y at the maxima stands for it, with statistics that are given.
    """
    x, w, y, taps, at_max, *norm = ctx.saved_tensors
    of_channels: list[Tensor | None] = [None] * 2
    if dz is not None:
        gradients: Any = differentiable_gradients if again else kernel_gradients
        if y is None:
            y = at_max
        else:
            window = _window(*ctx.window)
            dz = max_pool_backward(dz, taps, y.shape, is_channels_last(y), *window)
        training, wanted = y is not at_max, (any(needs[:3]), *needs[3:], False)
        more, *of_channels, _ = gradients(dz, y, None, *norm, None, *ctx.options, training, needs=wanted)
        dy = more if dy is None or more is None else dy + more
    of_operands = None, None, None
    if dy is not None:
        of_operands = operand_gradients(AS_ANYBODY, dy, x, w, None, *ctx.layout, needs, *ctx.geometry)
    return [*of_operands, *of_channels]


class _ConvNormPool(torch.autograd.Function):
    """mean and var are constants to autograd: the gradient goes through them by itself. y is a result, so that the way
    from it back to x, w and bias is the layer's own.
    """

    @staticmethod
    def forward(ctx, x, w, bias, mean, var, momentum, gamma, beta, *rest):
        ctx.options, ctx.window, ctx.geometry = rest[:3], rest[3:7], rest[7:]
        ctx.set_materialize_grads(False)
        how = bias, mean, var, momentum, gamma, beta, *rest
        z, y, taps, at_max, *own = conv_bn_act_pool_training(x, w, *how)
        ctx.mark_non_differentiable(taps, at_max, *own)
        of_pixels = (y, taps) if any(ctx.needs_input_grad[:3]) else (None, None)
        save_operands(ctx, y, x, w, *of_pixels, at_max, *own, gamma, beta)
        return z, y, taps, at_max, *own

    @staticmethod
    def backward(ctx, dz, dy, *others):  # pyright: ignore[reportIncompatibleMethodOverride]
        given = ctx.needs_input_grad
        needs = *given[:3], *given[6:8]
        again = torch.is_grad_enabled() or transformed()
        if dz is None or dy is not None or ctx.nothing or again:
            found = _by_separate_operators(ctx, dz, dy, needs, again)
        else:
            x, w, y, taps, at_max, *norm = ctx.saved_tensors
            how = *norm, *ctx.options, *ctx.window, x, w, *ctx.layout, needs, *ctx.geometry
            found = conv_bn_act_pool_backward(dz, taps, at_max, y, *how)
        dx, dw, dbias, *of_channels = (grad if need else None for grad, need in zip(found, needs, strict=True))
        return dx, dw, dbias, None, None, None, *of_channels, *[None] * 7, *[None] * len(ctx.geometry)


conv_bn_act_pool_training = register(
    "conv_bn_act_pool_training(Tensor x, Tensor w, Tensor? bias, Tensor(a!)? mean, Tensor(b!)? var, float momentum,"
    f" {NORM}, {WINDOW}, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _training,
    _fake_training,
    _ConvNormPool,
    composed=True,
)
conv_bn_act_pool_backward = register(
    "conv_bn_act_pool_backward(Tensor dz, Tensor? taps, Tensor at_max, Tensor? y, Tensor mean, Tensor var,"
    f" {NORM}, {WINDOW}, Tensor? x, Tensor? w, SymInt[4] x_shape, SymInt[4] w_shape,"
    f" bool channels_last, bool[5] needs, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    composed=True,
)
