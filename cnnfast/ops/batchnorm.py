"""Batch normalisation's operators: statistics, running statistics, normalise-activate(-add), and the sum over a
channel.

`normalize(training=True)` takes mean and var for the statistics of y, and its derivative goes through them. That is two
passes over memory; to differentiate statistics as tensors of their own would take a third. Without mean and var nothing
is normalised: it is act(y + beta + residual). `slope` is leaky_relu's, `slopes` are prelu's, [1] or [C].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels import batchnorm, memory
from cnnfast_kernels.activations import FROM_OUTPUT
from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.planes import dense_format

from ..activations import activate
from ..dispatch import transformed
from . import plain
from .registry import AS_ANYBODY, Calling, register


def statistics_like(y: Tensor) -> Tensor:
    return y.new_empty(y.shape[1], dtype=accumulator_dtype(y.dtype))


def _fake_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    return statistics_like(y), statistics_like(y)


def dense_like(y: Tensor) -> Tensor:
    return memory.empty(y.shape, y, dense_format(y))


def _fake_normalize(y: Tensor, *rest: Any) -> Tensor:
    return dense_like(y)


def _normalize(y: Tensor, mean, var, gamma, beta, residual, eps, activation, slope, slopes, training) -> Tensor:
    how = y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, None, False
    return batchnorm.normalize_leaving(*how)[0]  # which enters a function less than `normalize`


def _normalize_backward(dz: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(dz.new_empty(0) if g is None else g for g in batchnorm.normalize_backward(dz, *rest))


def fake_normalize_backward(
    dz: Tensor, y: Tensor | None, z: Tensor | None, mean: Tensor | None, var: Tensor | None, gamma, beta, *rest: Any
) -> tuple[Tensor, ...]:
    image, needs = dz if y is None else y, rest[-1]
    of = dz if mean is None else mean
    vectors = (dz.new_empty(dz.shape[1], dtype=(of if t is None else t).dtype) for t in (gamma, beta))
    grads = dense_like(image), *vectors, dense_like(image)
    return tuple(g if need else dz.new_empty(0) for g, need in zip(grads, needs, strict=True))


def derivative_from_output(activation: str | None, slope: float) -> bool:
    """Whether an activation's derivative can be told from its output alone."""
    return activation in FROM_OUTPUT and not (activation == "leaky_relu" and slope <= 0)


def kept_for_activation(
    z: Tensor, normed: bool, beta: Tensor | None, residual: Tensor | None, activation: str | None, slope: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(beta, residual, z) as far as backward needs them for act', beside y and the statistics.

    y is kept where it was normalised, and act' follows from it and beta where there is no residual: to read z too would
    be a tensor more in both passes. With a residual, or without y, it is read off z where it can be: z is kept by
    whatever comes next, u = bn(y) + residual by nobody.
    """
    if activation is None:
        return None, None, None
    if derivative_from_output(activation, slope) and not (normed and residual is None):
        return None, None, z
    return beta, residual, None


def no_gradient_of_prelu(operator: str) -> RuntimeError:
    """The error for an operator that shall be differentiated and was given prelu."""
    return RuntimeError(f"cnnfast::{operator} has no gradient with prelu: apply torch.prelu to what it gives without")


def replayed(y, mean, var, gamma, beta, residual, eps, activation, slope, training) -> Tensor:
    """normalize in PyTorch's own differentiable operators: derivatives above the first are taken of this."""
    u = y
    if mean is not None:
        u = F.batch_norm(y, *((None, None) if training else (mean, var)), gamma, None, training, 0.0, eps)
    if beta is not None:  # PyTorch's second derivative of a bias without a weight is wrong, hence added apart
        u = u + beta.to(u.dtype).view(1, -1, *[1] * (u.dim() - 2))
    return activate(u if residual is None else u + residual, activation, slope)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, training):
        if activation == "prelu":
            raise no_gradient_of_prelu("normalize")
        z = normalize(y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, training)
        of_u = kept_for_activation(z, mean is not None, beta, residual, activation, slope)
        # neither dy nor act' needs y where it is not normalised
        kept = None if mean is None and derivative_from_output(activation, slope) else y
        ctx.save_for_backward(kept, mean, var, gamma, *of_u)
        ctx.options = eps, activation, slope, training
        return z

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, mean, var, gamma, beta, residual, z = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5)]
        gradients = differentiable_gradients if torch.is_grad_enabled() or transformed() else kernel_gradients
        grads = gradients(dz, y, z, mean, var, gamma, beta, residual, *ctx.options, needs=needs)
        return grads[0], None, None, *grads[1:], None, None, None, None, None


def kernel_gradients(
    dz, y, z, mean, var, gamma, beta, residual, eps, activation, slope, training, needs, calling: Calling = AS_ANYBODY
) -> list[Tensor | None]:
    """(dy, dgamma, dbeta, dresidual), None where not needed. Without an activation dresidual is dz itself; without a
    norm, dy and dresidual are one tensor. y may be None as the kernels' normalize_backward has it.
    """
    if mean is None and activation is None:
        dbeta = calling(channel_sum)(dz) if needs[2] else None
        return [dz if needs[0] else None, None, dbeta, dz if needs[3] else None]
    if mean is None and needs[0] and needs[3]:
        needs = *needs[:3], False
        dy, _, dbeta, _ = kernel_gradients(
            dz, y, z, mean, var, gamma, beta, residual, eps, activation, slope, training, needs, calling
        )
        return [dy, None, dbeta, dy]
    by_kernel = (*needs[:3], needs[3] and activation is not None)
    grads: list[Tensor | None] = [None] * 4
    if any(by_kernel):
        out = calling(normalize_backward)(
            dz, y, z, mean, var, gamma, beta, residual, eps, activation, slope, training, by_kernel
        )
        grads = [g if need else None for g, need in zip(out, by_kernel, strict=True)]
    if needs[3] and activation is None:
        grads[3] = dz
    return grads


def differentiable_gradients(
    dz, y, z, mean, var, gamma, beta, residual, eps, activation, slope, training, needs
) -> list[Tensor | None]:
    """The same, in operators that can be differentiated."""
    options = eps, activation, slope, training
    grads: list[Tensor | None] = [None] * 4
    # Such an activation's derivative is piecewise constant; beta and residual are not needed beyond it.
    if derivative_from_output(activation, slope):
        if activation is not None:
            dz = _select(dz, _normalized_again(y, mean, var, gamma, beta, *options) if z is None else z, *options[1:3])
        activation = None
        of = dz if mean is None else mean
        grads[2] = dz.sum((0, *range(2, dz.dim())), dtype=of.dtype) if needs[2] else None
        grads[3] = dz if needs[3] else None
        if mean is None:
            grads[0] = dz if needs[0] else None
            return grads
        if y is None:  # it was not kept: the statistics are frozen and gamma wants no gradient, or dy is not wanted
            if needs[0]:
                scale = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
                grads[0] = (dz * scale.view(1, -1, *[1] * (dz.dim() - 2))).to(dz.dtype)
            return grads
        needs = [*needs[:2], False, False]
    operands = [y, gamma, beta, residual]
    wanted = [i for i, t in enumerate(operands) if needs[i] and t is not None]
    if not wanted:
        return grads

    def replay(*inputs):
        y, gamma, beta, residual = (inputs[wanted.index(i)] if i in wanted else t for i, t in enumerate(operands))
        return replayed(y, mean, var, gamma, beta, residual, eps, activation, slope, training)

    inputs = [operands[i] for i in wanted]
    if torch._C._are_functorch_transforms_active():  # autograd.grad knows no tensor of an outer level
        found = torch.func.vjp(replay, *inputs)[1](dz)
    else:
        with torch.enable_grad():
            found = torch.autograd.grad(replay(*inputs), inputs, dz, create_graph=True)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads


def _normalized_again(y, mean, var, gamma, beta, eps, activation, slope, training) -> Tensor:
    """z, which was not kept, as numbers and not as a function of anything. PyTorch's batch norm, which serves under a
    transform, takes no mixture of dtypes of a channel's numbers.
    """
    wide = accumulator_dtype(y.dtype)
    with torch.no_grad():
        channels = (None if t is None else t.to(wide) for t in (mean, var, gamma, beta))
        return normalize(y, *channels, None, eps, activation, slope, None, False)


def _select(dz: Tensor, z: Tensor, activation: str | None, slope: float) -> Tensor:
    """dz * act'(u), told from z = act(u)."""
    match activation:
        case "relu":
            return torch.where(z <= 0, 0.0, dz)
        case "leaky_relu":
            return torch.where(z > 0, dz, dz * slope)
        case "relu6":
            return torch.where((z <= 0) | (z >= 6), 0.0, dz)
    return dz


class _ChannelSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return channel_sum(x)

    @staticmethod
    def backward(ctx, dsum):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dsum.view(1, -1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape)


batch_moments = register("batch_moments(Tensor y) -> (Tensor, Tensor)", batchnorm.batch_moments, _fake_moments)
update_running = register(
    "update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum,"
    " SymInt count) -> ()",
    batchnorm.update_running,
    lambda *arguments: None,
)
normalize = register(
    "normalize(Tensor y, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, Tensor? residual, float eps,"
    " str? activation, float slope, Tensor? slopes, bool training) -> Tensor",
    _normalize,
    _fake_normalize,
    _Normalize,
    plain.normalize,
)
normalize_backward = register(
    "normalize_backward(Tensor dz, Tensor? y, Tensor? z, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta,"
    " Tensor? residual, float eps, str? activation, float slope, bool training, bool[4] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _normalize_backward,
    fake_normalize_backward,
)
channel_sum = register(
    "channel_sum(Tensor x) -> Tensor",
    batchnorm.channel_sum,
    lambda x: x.new_empty(x.shape[1]),
    _ChannelSum,
    plain.channel_sum,
)
