"""Batch norm behind a 1x1 convolution whose input is narrower than its output, without the convolution's own result:
the statistics before it runs, and the gradients after it, from the Gram matrix of the input.

batchnorm/gram.py has the formulas and the small matrices' kernels; the products over all pixels are those of conv.py.
What x adds to its own gradient, x V + k, is a second product (second_product.py) of the kernel of g Ws, or else a
forward pass of x, and the residual of that kernel.

All tensors are of half precision, whose products are summed in float32. In float32 the differences of large sums that
this takes cost accuracy: four times PyTorch's own error.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import memory
from .batchnorm import batch_moments, contiguous
from .batchnorm.gram import (
    OwnOperands,
    StatisticsOperands,
    WeightGradientOperands,
    plan_own,
    plan_statistics,
    plan_weight_gradient,
)
from .conv import conv_wgrad, dgrad_plan, fprop_plan
from .epilogue import BatchNorm, Epilogue
from .gradient_epilogue import NO_EPILOGUE, GradientEpilogue
from .keys import dgrad_key, fprop_key
from .layout import Layout, dense
from .questions import Geometry
from .second_product import SecondProduct

LAST = torch.channels_last
POINTWISE = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)


def met(x: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """The pixels of x [N, C, H, W] that a 1x1 convolution of this stride meets: a view."""
    return x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]


@lru_cache(1024)
def _floats(*shapes: tuple[int, ...]) -> tuple[Layout, ...]:
    return tuple(dense(shape, torch.float32) for shape in shapes)


def gram_statistics(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    mu: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean [K], biased variance [K], mu [C], P [K, C]) in float32: the statistics of conv(x, w) + bias over its N * P
    * Q pixels, the mean of each channel of x over them, and W Cov (batchnorm/gram.py).

    Shapes: x [N, C, H, W], w [K, C, 1, 1], of one dtype, float16 or bfloat16, in any memory layout; bias [K]. mu: where
    who made x left it already (batchnorm.normalize_mean), which spares a pass over x.
    """
    x = met(x, stride)
    N, C, P, Q = x.shape
    K = w.shape[0]
    if mu is None:
        mu, _ = batch_moments(x)
    gram = conv_wgrad(x, x, (C, C, 1, 1), POINTWISE, wide=True)
    products, mean, var = (memory.empty(of, x) for of in _floats((K, C), (K,), (K,)))
    (bias,) = contiguous(bias)
    run = plan_statistics(K, C, w.stride(), N * P * Q)
    run(StatisticsOperands(gram, mu, w, bias, products, mean, var))
    return mean, var, mu, products


def gram_gradients(
    g: torch.Tensor,
    sums: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    mu: torch.Tensor,
    products: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None,
    eps: float,
    stride: tuple[int, int],
    needs: tuple[bool, bool],
    below: GradientEpilogue = NO_EPILOGUE,
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dw, dgamma) of batch_norm(conv(x, w)) in training, dx and dw channels_last and only if `needs` asks,
    dgamma [K] in float32.

    Shapes: g [N, K, P, Q], the gradient of the norm's result, and `sums` [K], its sums over all pixels, in float32;
    x, w, mu, products and var as gram_statistics has them; gamma [K]. below: what is to be made of dx, where the stride
    is 1, and then the two sums that conv_dgrad_sums leaves are returned too.
    """
    N, K, P, Q = g.shape
    C, shape, x = x.shape[1], x.shape, met(x, stride)
    gradient = conv_wgrad(x, g, (K, C, 1, 1), POINTWISE, wide=True)
    dgamma, slopes, norm = (memory.empty(of, g) for of in _floats((K,), (K,), (4, C)))
    scaled = memory.empty((K, C, 1, 1), w)
    dw = memory.empty(w.shape, w, LAST) if needs[1] else None
    (gamma,) = contiguous(gamma)
    count = N * P * Q
    run = plan_weight_gradient(K, C, w.stride(), (0, 0) if dw is None else dw.stride(), count, eps)
    run(WeightGradientOperands(gradient, sums, products, mu, var, w, gamma, dgamma, slopes, scaled, dw))
    if not needs[0]:
        return None, dw, dgamma
    own = memory.empty((C, C, 1, 1), w)
    plan_own(K, C, w.stride(), count)(OwnOperands(w, slopes, scaled, sums, mu, own, norm))
    mean, ones, back, k = norm.unbind()
    asked, sums_below = (g, scaled, x.shape, LAST, POINTWISE, False, None), below is not NO_EPILOGUE
    second: SecondProduct | None = SecondProduct(x, own, back, k)
    plan = dgrad_plan(dgrad_key(*asked, below, sums_below, second))
    if not plan.sums_second:
        of_own = Epilogue(None, BatchNorm(mean, ones, back, k, 0.0))
        own_part = fprop_plan(fprop_key(x, own, POINTWISE, of_own, False, False, None)).run(x, own, of_own)
        below, second = below._replace(residual=own_part), None
        plan = dgrad_plan(dgrad_key(*asked, below, sums_below))
    if sums_below:
        dx, *of_below = plan.run_with_sums(g, scaled, None, below, second)
        return dx, dw, dgamma, *of_below
    dx = plan.run(g, scaled, None, below, second=second)
    if stride == (1, 1):
        return dx, dw, dgamma
    whole = memory.empty(shape, x, LAST).zero_()
    met(whole, stride).copy_(dx)
    return whole, dw, dgamma
