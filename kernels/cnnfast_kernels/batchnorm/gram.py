"""Batch norm behind a 1x1 convolution, from the Gram matrix of the convolution's input.

Of y = x W^T, with x [M, C] and W [K, C], the statistics follow from those of x alone, with S = sum x, G0 = x^T x:

    mu = S / M,  Cov = G0 / M - mu mu^T,  P = W Cov,  mean = W mu + bias,  var = rowsum(P * W)

So they are known before the convolution runs, and neither they nor any gradient needs y. With g [M, K] the gradient
before the norm's shift, sg = sum g and G = g^T x, the gradient of weights that the convolution had without its norm:

    Gc = G - sg mu^T,  dbeta = sg,  dgamma = invstd * rowsum(W * Gc),  scale = gamma * invstd
    dW = scale * (Gc - invstd * dgamma * P)
    dx = g Ws + x V + k,  Ws = scale * W,  V = W^T diag(B) W,  B = -scale * invstd * dgamma / M,
                          k = -V mu - Ws^T sg / M

These are the gradients of `gradients.py`, dy = scale * g + B * (y - mean) - scale * dbeta / M, with y and the products
of dy written out; they are linear in y, and y is linear in x. The matrices of this file are small: [K, C] and [C, C].
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..rounding import round_quotient, round_root
from ..tiling import cdiv

# Filters of a program of the statistics and the gradients; channels of one of `gram_own_kernel`: the fewest rows that a
# product may have, so that there are many programs.
ROWS = 16


@triton.jit
@no_type_check
def load_block(ptr, row, column, row_stride, column_stride, ok):
    """[rows, columns] of a matrix, in float32; zeros where not ok."""
    offsets = row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(ptr + offsets, mask=ok, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def power_of_two(x):
    """1 / x rounded down to a power of two, for x >= 0, and that power's own inverse. x times the first lies in [1, 2),
    unless x is 0 or beyond all that a sum of normal numbers can be.
    """
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    field = tl.minimum(tl.maximum(254 - exponent, 1), 253)
    return (field << 23).to(tl.float32, bitcast=True), ((254 - field) << 23).to(tl.float32, bitcast=True)


class StatisticsOperands(NamedTuple):
    """gram [C, C], mu [C] and the results products = P [K, C], mean [K], var [K] in float32; w [K, C], bias [K]."""

    gram: torch.Tensor
    mu: torch.Tensor
    w: torch.Tensor
    bias: torch.Tensor | None
    products: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


@triton.jit(do_not_specialize=["K", "count"])
@no_type_check
def gram_statistics_kernel(
    gram_ptr, mu_ptr, w_ptr, bias_ptr, products_ptr, mean_ptr, var_ptr, K, count, w_stride_k, w_stride_c,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """P, mean and variance of ROWS filters. count: pixels, M above."""
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k_ok = k < K
    count = count.to(tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    var = tl.zeros((ROWS,), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        c_ok = c < C
        mu = tl.load(mu_ptr + c, mask=c_ok, other=0.0)
        acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for other in range(0, C, BLOCK_C):
            d = other + tl.arange(0, BLOCK_C)
            d_ok = d < C
            w = load_block(w_ptr, k, d, w_stride_k, w_stride_c, k_ok[:, None] & d_ok[None, :])
            gram = load_block(gram_ptr, d, c, C, 1, d_ok[:, None] & c_ok[None, :])
            sums = count * tl.load(mu_ptr + d, mask=d_ok, other=0.0)
            # M * Cov: one rounding, where the difference of two products would have three
            acc = tl.dot(w, tl.fma(-sums[:, None], mu[None, :], gram), acc, input_precision="ieee")
        ok = k_ok[:, None] & c_ok[None, :]
        products = round_quotient(acc, count)
        tl.store(products_ptr + k.to(tl.int64)[:, None] * C + c[None, :], products, mask=ok)
        w = load_block(w_ptr, k, c, w_stride_k, w_stride_c, ok)
        mean += tl.sum(w * mu[None, :], 1)
        var += tl.sum(w * products, 1)
    if bias_ptr is not None:
        mean += tl.load(bias_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
    tl.store(mean_ptr + k, mean, mask=k_ok)
    tl.store(var_ptr + k, tl.where(var < 0, 0.0, var), mask=k_ok)  # not the maximum, which is no NaN


class WeightGradientOperands(NamedTuple):
    """products [K, C], mu [C], var [K], sums = sg [K] and gradient = G [K, C] in float32; w [K, C], gamma [K].

    Results: dgamma and slopes = B, [K] in float32, dw [K, C] if asked for, and Ws, scaled [K, C], in w's dtype.
    """

    gradient: torch.Tensor
    sums: torch.Tensor
    products: torch.Tensor
    mu: torch.Tensor
    var: torch.Tensor
    w: torch.Tensor
    gamma: torch.Tensor | None
    dgamma: torch.Tensor
    slopes: torch.Tensor
    scaled: torch.Tensor
    dw: torch.Tensor | None


@triton.jit(do_not_specialize=["K", "count"])
@no_type_check
def gram_weight_gradient_kernel(
    gradient_ptr, sums_ptr, products_ptr, mu_ptr, var_ptr, w_ptr, gamma_ptr, dgamma_ptr, slopes_ptr, scaled_ptr, dw_ptr,
    K, count, w_stride_k, w_stride_c, dw_stride_k, dw_stride_c,
    EPS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What belongs to ROWS filters of WeightGradientOperands' results."""
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k_ok = k < K
    invstd = round_quotient(1.0, round_root(tl.load(var_ptr + k, mask=k_ok, other=1.0) + EPS))
    scale = invstd
    if gamma_ptr is not None:
        scale = tl.load(gamma_ptr + k, mask=k_ok, other=0.0).to(tl.float32) * invstd
    sums = tl.load(sums_ptr + k, mask=k_ok, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        ok = k_ok[:, None] & (c < C)[None, :]
        mu = tl.load(mu_ptr + c, mask=c < C, other=0.0)
        w = load_block(w_ptr, k, c, w_stride_k, w_stride_c, ok)
        total += tl.sum(w * tl.fma(-sums[:, None], mu[None, :], load_block(gradient_ptr, k, c, C, 1, ok)), 1)
    dgamma = invstd * total
    tl.store(dgamma_ptr + k, dgamma, mask=k_ok)
    tl.store(slopes_ptr + k, round_quotient(-scale * invstd * dgamma, count.to(tl.float32)), mask=k_ok)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        ok = k_ok[:, None] & (c < C)[None, :]
        w = load_block(w_ptr, k, c, w_stride_k, w_stride_c, ok)
        scaled = (scale[:, None] * w).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + k.to(tl.int64)[:, None] * C + c[None, :], scaled, mask=ok)
        if dw_ptr is not None:
            mu = tl.load(mu_ptr + c, mask=c < C, other=0.0)
            centred = tl.fma(-sums[:, None], mu[None, :], load_block(gradient_ptr, k, c, C, 1, ok))
            products = load_block(products_ptr, k, c, C, 1, ok)
            dw = scale[:, None] * (centred - (invstd * dgamma)[:, None] * products)
            dw_offsets = k.to(tl.int64)[:, None] * dw_stride_k + c[None, :] * dw_stride_c
            tl.store(dw_ptr + dw_offsets, dw.to(dw_ptr.dtype.element_ty), mask=ok)


class OwnOperands(NamedTuple):
    """w [K, C], slopes = B [K], scaled = Ws [K, C], sums = sg [K], mu [C].

    Results: own [C, C], in w's dtype, is V with each row times a power of two, so that float16 holds it. norm [4, C] in
    float32 is the mean, variance, gamma and beta of the batch norm, with an eps of 0, that makes x V + k of x own.
    """

    w: torch.Tensor
    slopes: torch.Tensor
    scaled: torch.Tensor
    sums: torch.Tensor
    mu: torch.Tensor
    own: torch.Tensor
    norm: torch.Tensor


@triton.jit(do_not_specialize=["K", "count"])
@no_type_check
def gram_own_kernel(
    w_ptr, slopes_ptr, scaled_ptr, sums_ptr, mu_ptr, own_ptr, norm_ptr, K, count, w_stride_k, w_stride_c,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS channels of V, which is symmetric, and what belongs to them of k. COLUMNS: at least C."""
    HALF: tl.constexpr = w_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < C
    c = tl.arange(0, COLUMNS)
    c_ok = c < C
    highest = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        highest = tl.maximum(highest, tl.abs(tl.load(slopes_ptr + k, mask=k < K, other=0.0)))
    factor, inverse = power_of_two(tl.max(highest, 0))

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_ok = k < K
        ok = row_ok[:, None] & k_ok[None, :]
        slopes = factor * tl.load(slopes_ptr + k, mask=k_ok, other=0.0)
        rows = load_block(w_ptr, row, k, w_stride_c, w_stride_k, ok) * slopes[None, :]
        w = load_block(w_ptr, k, c, w_stride_k, w_stride_c, k_ok[:, None] & c_ok[None, :])
        acc = tl.dot(rows.to(HALF), w.to(HALF), acc)
        sums = tl.load(sums_ptr + k, mask=k_ok, other=0.0)
        of_sums += tl.sum(load_block(scaled_ptr, row, k, 1, C, ok) * sums[None, :], 1)

    row_factor, row_inverse = power_of_two(tl.max(tl.abs(acc), 1))
    own = (acc * row_factor[:, None]).to(HALF)
    tl.store(own_ptr + row.to(tl.int64)[:, None] * C + c[None, :], own, mask=row_ok[:, None] & c_ok[None, :])
    # k is computed of the matrices as the products have them, so that the sum of dx over all pixels stays 0.
    mu = tl.load(mu_ptr + c, mask=c_ok, other=0.0)
    back = row_inverse * inverse
    k = -tl.sum(own.to(tl.float32) * mu[None, :], 1) * back - round_quotient(of_sums, count.to(tl.float32))
    tl.store(norm_ptr + row, tl.zeros((ROWS,), tl.float32), mask=row_ok)
    tl.store(norm_ptr + C + row, tl.full((ROWS,), 1.0, tl.float32), mask=row_ok)
    tl.store(norm_ptr + 2 * C + row, back, mask=row_ok)
    tl.store(norm_ptr + 3 * C + row, k, mask=row_ok)


def _block(C: int) -> int:
    return min(64, max(16, triton.next_power_of_2(C)))


@launch.planned
def plan_statistics(K: int, C: int, w_strides: tuple[int, ...], count: int) -> launch.Launch[StatisticsOperands]:
    """Sets the results of StatisticsOperands, for an input of `count` pixels."""
    return launch.Launch(
        gram_statistics_kernel, (cdiv(K, ROWS),), K, count, *w_strides[:2], C=C, ROWS=ROWS, BLOCK_C=_block(C),
        num_warps=4,
    )  # fmt: skip


@launch.planned
def plan_weight_gradient(
    K: int, C: int, w_strides: tuple[int, ...], dw_strides: tuple[int, ...], count: int, eps: float
) -> launch.Launch[WeightGradientOperands]:
    """Sets the results of WeightGradientOperands."""
    return launch.Launch(
        gram_weight_gradient_kernel, (cdiv(K, ROWS),), K, count, *w_strides[:2], *dw_strides[:2],
        EPS=eps, C=C, ROWS=ROWS, BLOCK_C=_block(C), num_warps=4,
    )  # fmt: skip


@launch.planned
def plan_own(K: int, C: int, w_strides: tuple[int, ...], count: int) -> launch.Launch[OwnOperands]:
    """Sets the results of OwnOperands."""
    return launch.Launch(
        gram_own_kernel, (cdiv(C, ROWS),), K, count, *w_strides[:2],
        C=C, COLUMNS=max(16, triton.next_power_of_2(C)), ROWS=ROWS, BLOCK_K=32, num_warps=4,
    )  # fmt: skip
