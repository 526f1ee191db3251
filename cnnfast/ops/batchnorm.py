"""Batch normalisation's operators: statistics, running statistics, normalise-activate(-add), and the sum over a
channel.

`normalize(training=True)` takes mean and var for those of y, and its derivative goes through them: two passes over
memory, where statistics differentiated as tensors of their own would cost a third.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels import batchnorm, memory
from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.epilogue import FROM_OUTPUT
from cnnfast_kernels.planes import dense_format

from ..activations import activate
from ..dispatch import transformed
from . import plain
from .registry import register


def _statistics_like(y: Tensor) -> Tensor:
    return y.new_empty(y.shape[1], dtype=accumulator_dtype(y.dtype))


def _fake_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    return _statistics_like(y), _statistics_like(y)


def _dense_like(y: Tensor) -> Tensor:
    return memory.empty(y.shape, y, dense_format(y))


def _fake_normalize(y: Tensor, *rest: Any) -> Tensor:
    return _dense_like(y)


def _normalize_backward(
    dz: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    mean,
    var,
    weight,
    bias,
    residual,
    eps,
    activation,
    slope,
    training,
    needs,
) -> tuple[Tensor, ...]:
    grads = batchnorm.normalize_backward(
        dz, y, z, mean, var, weight, bias, residual, eps, activation, slope, training, tuple(needs)
    )
    return tuple(dz.new_empty(0) if g is None else g for g in grads)


def _fake_normalize_backward(
    dz: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    mean,
    var,
    weight,
    bias,
    residual,
    eps,
    activation,
    slope,
    training,
    needs,
) -> tuple[Tensor, ...]:
    image = dz if y is None else y
    grads = (
        _dense_like(image),
        *(torch.empty_like(mean if t is None else t) for t in (weight, bias)),
        _dense_like(image),
    )
    return tuple(g if need else dz.new_empty(0) for g, need in zip(grads, needs, strict=True))


def _from_output(activation: str | None, slope: float) -> bool:
    return activation in FROM_OUTPUT and not (activation == "leaky_relu" and slope <= 0)


def _replay(y, mean, var, weight, bias, residual, eps, activation, slope, training) -> Tensor:
    """normalize in PyTorch's own differentiable operators: derivatives above the first are taken of this."""
    u = F.batch_norm(y, *((None, None) if training else (mean, var)), weight, None, training, 0.0, eps)
    if bias is not None:  # PyTorch's second derivative of a bias without a weight is wrong, hence added apart
        u = u + bias.to(u.dtype).view(1, -1, *[1] * (u.dim() - 2))
    return activate(u if residual is None else u + residual, activation, slope)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, mean, var, weight, bias, residual, eps, activation, slope, training):
        z = normalize(y, mean, var, weight, bias, residual, eps, activation, slope, training)
        # act' is read off z where it can be: z is kept by whatever comes next, u = bn(y) + residual by nobody
        from_output = _from_output(activation, slope)
        of_u = (None, None, z if activation else None) if from_output else (bias, residual, None)
        ctx.save_for_backward(y, mean, var, weight, *of_u)
        ctx.options = eps, activation, slope, training
        return z

    @staticmethod
    def backward(ctx, dz):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, mean, var, weight, bias, residual, z = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5)]
        if torch.is_grad_enabled() or transformed():
            grads = _differentiable_backward(dz, y, mean, var, weight, bias, residual, z, ctx.options, needs)
        else:
            grads = _backward(dz, y, z, mean, var, weight, bias, residual, *ctx.options, needs=needs)
        return grads[0], None, None, *grads[1:], None, None, None, None


def _backward(
    dz, y, z, mean, var, weight, bias, residual, eps, activation, slope, training, needs
) -> list[Tensor | None]:
    """(dy, dweight, dbias, dresidual), None where not needed. Without an activation dresidual is dz itself."""
    by_kernel = [*needs[:3], needs[3] and activation is not None]
    grads: list[Tensor | None] = [None] * 4
    if any(by_kernel):
        out = normalize_backward(
            dz, y, z, mean, var, weight, bias, residual, eps, activation, slope, training, by_kernel
        )
        grads = [g if need else None for g, need in zip(out, by_kernel, strict=True)]
    if needs[3] and activation is None:
        grads[3] = dz
    return grads


def _differentiable_backward(dz, y, mean, var, weight, bias, residual, z, options, needs) -> list[Tensor | None]:
    eps, activation, slope, training = options
    grads: list[Tensor | None] = [None] * 4
    # its derivative is piecewise constant; bias and residual were not kept, nor are they needed
    if _from_output(activation, slope):
        dz = dz if z is None else _select(dz, z, activation, slope)
        activation = None
        grads[2] = dz.sum((0, *range(2, dz.dim())), dtype=mean.dtype) if needs[2] else None
        grads[3] = dz if needs[3] else None
        needs = [*needs[:2], False, False]
    operands = [y, weight, bias, residual]
    wanted = [i for i, t in enumerate(operands) if needs[i] and t is not None]
    if not wanted:
        return grads

    def replay(*inputs):
        y, weight, bias, residual = (inputs[wanted.index(i)] if i in wanted else t for i, t in enumerate(operands))
        return _replay(y, mean, var, weight, bias, residual, eps, activation, slope, training)

    inputs = [operands[i] for i in wanted]
    if torch._C._are_functorch_transforms_active():  # autograd.grad knows no tensor of an outer level
        found = torch.func.vjp(replay, *inputs)[1](dz)
    else:
        with torch.enable_grad():
            found = torch.autograd.grad(replay(*inputs), inputs, dz, create_graph=True)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads


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


def frozen_backward(
    dz: Tensor,
    z: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dy, dbias, dresidual) of z = act(batch_norm(y) + residual) with frozen statistics and weight: y itself is not
    needed.
    """
    need_y, need_bias, need_residual = needs
    if not torch.is_grad_enabled() and not transformed():
        dy, _, dbias, dresidual = _backward(
            dz,
            None,
            z,
            mean,
            var,
            weight,
            None,
            None,
            eps,
            activation,
            slope,
            False,
            [need_y, False, need_bias, need_residual],
        )
        return dy, dbias, dresidual
    g = dz if z is None else _select(dz, z, activation, slope)
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    dy = (g * scale.view(1, -1, 1, 1)).to(dz.dtype) if need_y else None
    return dy, channel_sum(g) if need_bias else None, g if need_residual else None


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
    "update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, SymInt count) -> ()",
    batchnorm.update_running,
    lambda *arguments: None,
)
normalize = register(
    "normalize(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? activation, float slope,"
    " bool training) -> Tensor",
    lambda y, mean, var, weight, bias, residual, eps, activation, slope, training: batchnorm.normalize(
        y, mean, var, weight, bias, residual, eps, activation, slope
    ),
    _fake_normalize,
    _Normalize,
)
normalize_backward = register(
    "normalize_backward(Tensor dz, Tensor? y, Tensor? z, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual,"
    " float eps, str? activation, float slope, bool training, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _normalize_backward,
    _fake_normalize_backward,
)
channel_sum = register(
    "channel_sum(Tensor x) -> Tensor",
    batchnorm.channel_sum,
    lambda x: x.new_empty(x.shape[1]),
    _ChannelSum,
    plain.channel_sum,
)
