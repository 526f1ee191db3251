"""The two ways a convolution trains together with its batch norm, in plain PyTorch that rounds where kernels round.

Both compute z = act(batch_norm(conv(x, w)) + residual) by the batch's own statistics, and their gradients. The dtype of
x is that of every tensor of an image's size, which is what gets rounded: x, w as it is multiplied, residual, the
convolution's own result, z and all gradients that are an image's. Between two roundings, and for what is a channel's,
numbers are of the accumulators' dtype: float32, or float64 for float64 tensors, in which therefore nothing is rounded
at all and both routes are batch norm's exact derivative.

Letters: M = N * P * Q pixels; C channels of x, K of z; mean, var [K], var the biased one; invstd = 1 / sqrt(var + eps);
s = gamma * invstd; g [M, K] the gradient of z where the activation lets it through, of y's dtype; sums over pixels.

The ordinary route stores y = conv(x, w) and takes its statistics from what is stored. With xhat = (y - mean) * invstd,

    dbeta = sum g        dgamma = sum g * xhat        dy = s * (g - dbeta / M - xhat * dgamma / M)

The Gram route is for 1x1 convolutions, y = x w^T for x [M, C]. Since y is linear in x, so is its mean, and its variance
is a quadratic form of the covariance of x, which the Gram matrix x^T x tells before the convolution runs:

    mu = sum x / M       Cov = x^T x / M - mu mu^T       P = w Cov
    mean = w mu          var = rowsum(P * w)

So y is normalized as it is summed, and is neither stored nor rounded. Backward does not need it either. Let
G = g^T x and Gc = G - dbeta mu^T. Then sum g * (y - mean) = rowsum(w * Gc), and, y - mean being (x - mu) w^T,

    dgamma = invstd * rowsum(w * Gc)
    dw = dy^T x = s * (Gc - dgamma * invstd * P)
    dx = dy w = g Ws + x V + k    with Ws = s * w, B = -s * invstd * dgamma / M,
                                       V = w^T diag(B) w [C, C], k = -mu V - (dbeta / M) Ws

Here dy is the ordinary route's: dy^T x is s * (G - dbeta mu^T) with the third term's (x^T xhat) / M = P^T * invstd; its
second term is constant over the pixels, so that k holds it beside what centres x V. Ws and V are rounded as operands of
products, and k is computed from them as rounded: the terms that are constant over the pixels then cancel as exactly as
without rounding. V is of the size of 1 / M: each of its columns is scaled by a power of two, which float16 needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .windows import Size2, pair

Layer = tuple[Tensor, Tensor, Tensor]  # z, mean, var


def ordinary_conv_bn_act(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "relu",
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Layer:
    """(z, mean, var) of act(batch_norm(conv2d(x, w)) + residual) by the ordinary route, any convolution.

    x [N, C, H, W] of any floating dtype, which is that of z; w [K, C / groups, R, S], gamma, beta [K] of any, the
    gradients of each of the same; residual [N, K, P, Q] as z, or None; activation "relu" or None. mean, var [K] in the
    accumulators' dtype are the batch's, var biased, and are constants to autograd.
    """
    geometry = pair(stride), pair(padding), pair(dilation), groups
    return _Ordinary.apply(x, w, gamma, beta, residual, eps, activation, geometry)  # pyright: ignore


def gram_conv_bn_act(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "relu",
    stride: Size2 = 1,
) -> Layer:
    """(z, mean, var) of act(batch_norm(conv2d(x, w, stride=stride)) + residual) by the Gram route.

    w [K, C, 1, 1]; the other arguments and the results are those of ordinary_conv_bn_act.
    """
    return _Gram.apply(x, w, gamma, beta, residual, eps, activation, pair(stride))  # pyright: ignore


def accumulators_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels sum values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_for(dtype: torch.dtype, v: Tensor) -> tuple[Tensor, Tensor]:
    """(v with each column divided by a power of two and rounded to `dtype`, those powers [columns]): the largest
    magnitude of a column becomes one of 0.5 to 1.
    """
    exponent = torch.frexp(v.abs().amax(0)).exponent.clamp(-126, 126)
    powers = torch.ldexp(torch.ones_like(v[0]), exponent)
    return (v / powers).to(dtype), powers


def _rows(image: Tensor) -> Tensor:
    """[N, C, H, W] as [M, C], in the accumulators' dtype."""
    return image.movedim(1, -1).flatten(0, 2).to(accumulators_of(image.dtype))


def _image(rows: Tensor, like: torch.Size) -> Tensor:
    """[M, C] as [N, C, H, W] with the pixels of `like`."""
    return rows.unflatten(0, (like[0], *like[2:])).movedim(-1, 1)


def _of_channels(t: Tensor) -> Tensor:
    return t[:, None, None]


def _finished(u: Tensor, residual: Tensor | None, activation: str | None, dtype: torch.dtype) -> Tensor:
    """act(u + residual), rounded: the only rounding after the norm."""
    u = u if residual is None else u + residual.to(u.dtype)
    return (u.clamp_min(0.0) if activation == "relu" else u).to(dtype)


def _masked(dz: Tensor, z: Tensor, activation: str | None) -> Tensor:
    """The gradient of what the activation was applied to. float16 may have rounded a positive argument to a z of 0;
    such a pixel counts as not positive.
    """
    return dz.where(z > 0, 0.0) if activation == "relu" else dz


class _Ordinary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, gamma, beta, residual, eps, activation, geometry):  # pyright: ignore
        dtype, wide = x.dtype, accumulators_of(x.dtype)
        operand = w.to(dtype)
        y = F.conv2d(x.to(wide), operand.to(wide), None, *geometry).to(dtype)
        centred = y.to(wide)
        mean = centred.mean((0, 2, 3))
        centred = centred - _of_channels(mean)
        var = centred.square().mean((0, 2, 3))
        invstd = torch.rsqrt(var + eps)
        u = centred * _of_channels(invstd * gamma.to(wide)) + _of_channels(beta.to(wide))
        z = _finished(u, residual, activation, dtype)
        ctx.save_for_backward(x, operand, gamma, y, mean, invstd, z)
        ctx.how = activation, geometry, w.dtype, beta.dtype
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: Any):  # pyright: ignore
        x, operand, gamma, y, mean, invstd, z = ctx.saved_tensors
        activation, geometry, of_w, of_beta = ctx.how
        dtype, wide = x.dtype, accumulators_of(x.dtype)
        g = _masked(dz, z, activation)
        masked, centred = g.to(wide), y.to(wide) - _of_channels(mean)
        count = y.numel() // y.shape[1]
        dbeta = masked.sum((0, 2, 3))
        dgamma = invstd * (masked * centred).sum((0, 2, 3))
        s = gamma.to(wide) * invstd
        dy = _of_channels(s) * masked - _of_channels(s * invstd * dgamma / count) * centred
        dy = (dy - _of_channels(s * dbeta / count)).to(dtype).to(wide)
        dx = conv2d_input(x.shape, operand.to(wide), dy, *geometry).to(dtype)
        dw = conv2d_weight(x.to(wide), operand.shape, dy, *geometry).to(of_w)
        dresidual = g if ctx.needs_input_grad[4] else None
        return dx, dw, dgamma.to(gamma.dtype), dbeta.to(of_beta), dresidual, None, None, None


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, gamma, beta, residual, eps, activation, stride):  # pyright: ignore
        dtype, wide = x.dtype, accumulators_of(x.dtype)
        operand = w.flatten(1).to(dtype).to(wide)
        seen = x[:, :, :: stride[0], :: stride[1]]
        rows = _rows(seen)
        mu = rows.sum(0) / len(rows)
        covariance = (rows.T @ rows) / len(rows) - torch.outer(mu, mu)
        p = operand @ covariance
        mean, var = operand @ mu, (p * operand).sum(1).clamp_min(0.0)
        invstd = torch.rsqrt(var + eps)
        u = ((rows @ operand.T) - mean) * (gamma.to(wide) * invstd) + beta.to(wide)
        z = _finished(_image(u, seen.shape), residual, activation, dtype)
        ctx.save_for_backward(x, operand, gamma, mu, p, invstd, z)
        ctx.how = activation, stride, w.dtype, beta.dtype
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: Any):  # pyright: ignore
        x, operand, gamma, mu, p, invstd, z = ctx.saved_tensors
        activation, stride, of_w, of_beta = ctx.how
        dtype, wide = x.dtype, accumulators_of(x.dtype)
        image = _masked(dz, z, activation)
        g, rows = _rows(image), _rows(x[:, :, :: stride[0], :: stride[1]])
        count, s = len(rows), gamma.to(wide) * invstd
        dbeta = g.sum(0)
        centred = g.T @ rows - torch.outer(dbeta, mu)
        dgamma = invstd * (operand * centred).sum(1)
        dw = s[:, None] * (centred - (dgamma * invstd)[:, None] * p)

        scaled = (s[:, None] * operand).to(dtype).to(wide)
        b = -s * invstd * dgamma / count
        v, powers = scaled_for(dtype, operand.T @ (b[:, None] * operand))
        k = -(mu @ v.to(wide)) * powers - (dbeta / count) @ scaled
        rest = ((rows @ v.to(wide)) * powers + k).to(dtype).to(wide)
        dseen = _image((g @ scaled + rest).to(dtype), image.shape)
        dx = x.new_zeros(x.shape)
        dx[:, :, :: stride[0], :: stride[1]] = dseen
        dw = dw.to(of_w)[:, :, None, None]
        dresidual = image if ctx.needs_input_grad[4] else None
        return dx, dw, dgamma.to(gamma.dtype), dbeta.to(of_beta), dresidual, None, None, None
