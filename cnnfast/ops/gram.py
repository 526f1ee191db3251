"""A 1x1 convolution whose input is narrower than its output, with its batch norm, addition and activation, in training:
by the Gram matrix of its input.

The statistics are known before the convolution runs (cnnfast_kernels/batchnorm/gram.py), so that convolution, norm,
addition and activation are one kernel, and y, the convolution's own result and the widest tensor there is, is neither
written nor read nor saved. That is for half precision alone: float32 would lose accuracy. Saved are x, w, two small
matrices and, for the activation's derivative, the result z, which whoever comes next keeps anyway.

Everything else is as in conv_norm.py: running statistics are updated, and a gradient that may itself be differentiated
is computed by the separate operators, from y computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cnnfast_kernels import conv, gram
from cnnfast_kernels.epilogue import PLAIN, BatchNorm
from cnnfast_kernels.gradient_epilogue import GradientEpilogue
from cnnfast_kernels.keys import fprop_key
from cnnfast_kernels.layout import Laid, convolution_format

from .. import dispatch
from . import conv_implementations as implementations
from .batchnorm import dense_like, derivative_from_output, differentiable_gradients, update_running
from .block_passes import activation_backward
from .conv import conv_fprop, operand_gradients
from .conv_implementations import GEOMETRY, unpack
from .conv_norm import fused_bn_act
from .registry import AS_ANYBODY, Calling, register
from .serving import kernels_serve, library_comes_first

# With fewer pixels a channel of the input, the matrices are no smaller than what they stand for, and the variance is
# one of about as many numbers as there are channels.
PIXELS_PER_CHANNEL = 8
# Of C * C / K: the Gram matrix and V take C * C products a pixel, and what they spare is traffic of K numbers a pixel.
# By a model, at the rates of an H200, that pays up to this ratio, and at twice as much it does not. Not measured.
MOST_EXTRA_WORK = 128
HALF = torch.float16, torch.bfloat16
SUMS = torch.float32


def gram_serves(
    x: Laid, w: Tensor, pixels: int, activation: str | None, slope: float, geometry: Any, algorithm: str
) -> bool:
    """Whether conv_bn_act_by_gram is the way to act(batch_norm(conv(x, w)) + residual) in training. x: a Layout where
    it is not computed yet; pixels: those of the result, N * P * Q.

    It is where our kernel would serve conv_stats: by a measured row, or because it was asked for. While torch.compile
    traces, no row is asked, for the batch may be a variable.
    """
    K, C, *taps = w.shape
    _, padding, _, groups = geometry
    if taps != [1, 1] or C >= K or groups > 1 or x.dtype not in HALF or any(padding) or algorithm == "im2col":
        return False
    if C * C > MOST_EXTRA_WORK * K:
        return False
    if activation is not None and not derivative_from_output(activation, slope):
        return False
    if pixels < PIXELS_PER_CHANNEL * C or convolution_format(x, w) != torch.channels_last:
        return False
    asked = algorithm == "direct" or not dispatch.library_allowed()
    if asked or is_compiling() or type(w) not in dispatch.PLAIN:
        return asked or not library_comes_first(w.device)
    how, _ = unpack((*geometry, algorithm))
    return kernels_serve(conv.fprop_plan(fprop_key(x, w, how, PLAIN, True, False, None)), w.device)


# ----------------------------------------------------------------------------------------------------------------------
# What the operators do


def _statistics(x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, given: Tensor | None) -> tuple[Tensor, ...]:
    mean, var, mu, products = gram.gram_statistics(x, w, bias, tuple(stride), given)
    return mean, var, mu if given is None else mean.new_empty(0), products


def _fake_statistics(x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, given: Tensor | None = None):
    K, C = w.shape[:2]
    mu = (C,) if given is None else (0,)
    return tuple(x.new_empty(shape, dtype=SUMS) for shape in ((K,), (K,), mu, (K, C)))


def _gradients(g: Tensor, sums: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mu, products, var, gamma, eps, stride, needs = rest
    found = gram.gram_gradients(g, sums, x, w, mu, products, var, gamma, eps, tuple(stride), needs)
    return tuple(g.new_empty(0) if t is None else t for t in found)


def _fake_gradients(g: Tensor, sums: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    dx = implementations.fake_dgrad(g, w, None, x.shape, True) if needs[0] else g.new_empty(0)
    dw = implementations.fake_wgrad(x, g, w.shape, True) if needs[1] else g.new_empty(0)
    return dx, dw, torch.empty_like(sums)


def _gradients_below(g: Tensor, sums: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """(g of the layer below, dw, dgamma, and of that g the sums of conv_dgrad_below), where x is relu(norm(y))."""
    mu, products, var, gamma, eps, stride, y, mean_below, var_below, gamma_below, beta_below, eps_below, need_w = rest
    norm = BatchNorm(mean_below, var_below, gamma_below, beta_below, eps_below)
    below = GradientEpilogue(None, y, None, None, norm, "relu", 0.0)
    of = g, sums, x, w, mu, products, var, gamma, eps, tuple(stride), (True, need_w)
    found = gram.gram_gradients(*of, below)
    return tuple(g.new_empty(0) if t is None else t for t in found)


def _fake_gradients_below(g: Tensor, sums: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    own = x.new_empty(x.shape[1], dtype=SUMS)
    return *_fake_gradients(g, sums, x, w, (True, rest[-1])), own, torch.empty_like(own)


def _by_gram(
    calling: Calling,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    momentum: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """(z, mean, variance, mean of x, P): act(batch_norm(conv(x, w) + bias) + residual) by the batch's own statistics,
    which are returned; `mean` and `var` are the running ones, if there are any, and are updated.

    rest: from gamma to slope, and GEOMETRY.
    """
    end, geometry = rest[:-5], rest[-5:]
    *own, of_x, products = calling(gram_statistics)(x, w, bias, geometry[0], None)
    z = calling(fused_bn_act)(x, w, bias, *own, *end, None, *geometry[:4], "direct")
    if mean is not None:
        calling(update_running)(mean, var, *own, momentum, z.shape[0] * z.shape[2] * z.shape[3])
    return z, *own, of_x, products


def _fake_by_gram(x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    geometry = rest[-5:]
    return implementations.fake_bn_act(x, w, *geometry), *_fake_statistics(x, w, bias, geometry[0])


def _backward(
    calling: Calling,
    dz: Tensor,
    z: Tensor | None,
    beta: Tensor | None,
    activation: str | None,
    slope: float,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """(dx, dw, dbias, dgamma, dbeta, dresidual), None where not needed. dbias is 0, since batch norm takes a bias away.
    Without an activation dresidual is dz itself, which nobody has to ask for.
    """
    *operands, gamma, eps, stride, needs = rest
    g, sums = calling(activation_backward)(dz, z, None, activation, slope)
    g = dz if activation is None else g
    dx = dw = dgamma = None
    if needs[0] or needs[1] or needs[3]:
        dx, dw, dgamma = calling(gram_gradients)(g, sums, *operands, gamma, eps, stride, needs[:2])
    dbias = dz.new_zeros(dz.shape[1]) if needs[2] else None
    dgamma = dgamma.to(SUMS if gamma is None else gamma.dtype) if needs[3] and dgamma is not None else None
    dbeta = sums.to(SUMS if beta is None else beta.dtype) if needs[4] else None
    return dx if needs[0] else None, dw if needs[1] else None, dbias, dgamma, dbeta, g if needs[5] else None


def _fake_backward(dz: Tensor, z: Tensor | None, beta: Tensor | None, activation, slope, x, w, *rest: Any):
    gamma, *_, needs = rest[-4:]
    of_channels = (dz.new_empty(dz.shape[1], dtype=SUMS if t is None else t.dtype) for t in (gamma, beta))
    grads = (
        implementations.fake_dgrad(dz, w, None, x.shape, True),
        implementations.fake_wgrad(x, dz, w.shape, True),
        dz.new_empty(dz.shape[1]),
        *of_channels,
        dense_like(dz),
    )
    return tuple(g if need else dz.new_empty(0) for g, need in zip(grads, needs, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


class _ByGram(torch.autograd.Function):
    """mean and var are constants to autograd: the gradient goes through them by itself."""

    @staticmethod
    def forward(ctx, x, w, bias, mean, var, momentum, gamma, beta, residual, eps, activation, slope, *geometry):
        end = gamma, beta, residual, eps, activation, slope
        z, *own = conv_bn_act_by_gram(x, w, bias, mean, var, momentum, *end, *geometry)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*own)
        operands = (x, w) if any(ctx.needs_input_grad[i] for i in (0, 1, 2, 6)) else (None, None)
        ctx.save_for_backward(*operands, bias, z if activation else None, gamma, beta, *own)
        ctx.options, ctx.geometry = (eps, activation, slope), geometry
        return z, *own

    @staticmethod
    def backward(ctx, dz, *others):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, bias, z, gamma, beta, mean, var, of_x, products = ctx.saved_tensors
        eps, activation, slope = ctx.options
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 1, 2, 6, 7, 8))
        grads: list[Tensor | None] = [None] * 6
        if dz is not None and (torch.is_grad_enabled() or dispatch.transformed()):
            y = None if x is None else conv_fprop(x, w, bias, *ctx.geometry)
            of_norm = y, z, mean, var, gamma, beta, None, eps, activation, slope, True
            dy, *of_channels = differentiable_gradients(dz, *of_norm, needs=(any(needs[:3]), *needs[3:]))
            grads = [None, None, None, *of_channels]
            if dy is not None:
                assert x is not None
                layout = x.shape, w.shape, True
                grads[:3] = operand_gradients(AS_ANYBODY, dy, x, w, None, *layout, needs, *ctx.geometry)
        elif dz is not None:
            asked = *needs[:5], needs[5] and activation is not None
            if any(asked):
                how = of_x, products, var, gamma, eps, ctx.geometry[0], asked
                found = conv_bn_act_by_gram_backward(dz, z, beta, activation, slope, x, w, *how)
                grads = [grad if need else None for grad, need in zip(found, asked, strict=True)]
            if needs[5] and activation is None:
                grads[5] = dz
        return *grads[:3], None, None, None, *grads[3:], None, None, None, *[None] * len(ctx.geometry)


gram_statistics = register(
    "gram_statistics(Tensor x, Tensor w, Tensor? bias, SymInt[2] stride, Tensor? mu)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _statistics,
    _fake_statistics,
)
gram_gradients = register(
    "gram_gradients(Tensor g, Tensor sums, Tensor x, Tensor w, Tensor mu, Tensor products, Tensor var, Tensor? gamma,"
    " float eps, SymInt[2] stride, bool[2] needs) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _fake_gradients,
)
gram_gradients_below = register(
    "gram_gradients_below(Tensor g, Tensor sums, Tensor x, Tensor w, Tensor mu, Tensor products, Tensor var,"
    " Tensor? gamma, float eps, SymInt[2] stride, Tensor y, Tensor mean_below, Tensor var_below, Tensor? gamma_below,"
    " Tensor? beta_below, float eps_below, bool need_w) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients_below,
    _fake_gradients_below,
)
conv_bn_act_by_gram = register(
    "conv_bn_act_by_gram(Tensor x, Tensor w, Tensor? bias, Tensor(a!)? mean, Tensor(b!)? var, float momentum,"
    f" Tensor? gamma, Tensor? beta, Tensor? residual, float eps, str? activation, float slope, {GEOMETRY})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _by_gram,
    _fake_by_gram,
    _ByGram,
    composed=True,
)
conv_bn_act_by_gram_backward = register(
    "conv_bn_act_by_gram_backward(Tensor dz, Tensor? z, Tensor? beta, str? activation, float slope, Tensor x, Tensor w,"
    " Tensor mu, Tensor products, Tensor var, Tensor? gamma, float eps, SymInt[2] stride, bool[6] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    composed=True,
)
