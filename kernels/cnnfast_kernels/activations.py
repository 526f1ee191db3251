"""Activations and their derivatives, as @triton.jit helpers.

They compare and select, and never multiply by what a comparison gave, so that NaN and infinities pass as in PyTorch.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

ACTIVATIONS = (
    *(None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish"),
    *("mish", "hardsigmoid", "prelu"),
)
# act'(u) can be told from act(u) alone (leaky_relu: for slopes above 0), so that u need not be kept for backward
FROM_OUTPUT = (None, "relu", "leaky_relu", "relu6")


@triton.jit
@no_type_check
def reciprocal(v):
    """1 / v for what an exponential makes, 1 or more. The exponential is approximate on a GPU already, to 2 ulp and
    more, and `/` adds 2 ulp at most where v stays below 2**126: an exact division would cost every element of a tile
    some ten instructions and make nothing exact. Above 2**126 the result is below 2**-126, and may be 0.
    """
    return 1.0 / v


@triton.jit
@no_type_check
def sigmoid(u):
    """1 / (1 + exp(-u))."""
    return reciprocal(1.0 + tl.exp(-u))


@triton.jit
@no_type_check
def activate(u, slope, ACTIVATION: tl.constexpr):
    """act(u); `slope` is leaky_relu's, or a row of prelu's. Formulas as in torch.nn.functional."""
    if ACTIVATION == "relu":
        u = tl.where(u < 0, 0.0, u)
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        u = tl.where(u > 0, u, u * slope)
    elif ACTIVATION == "relu6":
        u = tl.where(u < 0, 0.0, tl.where(u > 6, 6.0, u))
    elif ACTIVATION == "gelu":
        SQRT_HALF: tl.constexpr = 0.7071067811865476
        u = 0.5 * u * (1.0 + tl.erf(u * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh v) = sigmoid(2 v)
        TANH_SCALE: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
        TANH_CUBIC: tl.constexpr = 0.044715
        u = u * sigmoid((u + u * u * u * TANH_CUBIC) * TANH_SCALE)
    elif ACTIVATION == "silu":
        u = u * sigmoid(u)
    elif ACTIVATION == "hardswish":
        u = u * tl.where(u < -3, 0.0, tl.where(u > 3, 6.0, u + 3.0)) * (1.0 / 6.0)
    elif ACTIVATION == "mish":  # tanh(softplus(u)) = n / (n + 2) with n = e^u (e^u + 2), and from 20 on it rounds to 1
        exponential = tl.exp(tl.minimum(u, 20.0))
        n = exponential * (exponential + 2.0)
        u = u * tl.where(u > 20, 1.0, n * reciprocal(n + 2.0))
    elif ACTIVATION == "hardsigmoid":
        u = tl.where(u < -3, 0.0, tl.where(u > 3, 1.0, (u + 3.0) * (1.0 / 6.0)))
    return u


@triton.jit
@no_type_check
def largest_zero(u, STORED: tl.constexpr):
    """The largest number of u's dtype that is stored as 0 in the dtype STORED, None: in u's own. Ties are to even.

    To round u and widen it again, to be compared, would do nothing: LLVM takes the one for the inverse of the other.
    """
    # half the smallest subnormal number
    ZERO: tl.constexpr = 2.0**-25 if STORED == tl.float16 else 2.0**-134 if STORED == tl.bfloat16 else 0.0
    return tl.full((), ZERO, u.dtype)


@triton.jit
@no_type_check
def activate_backward(dz, u, slope, ACTIVATION: tl.constexpr, STORED: tl.constexpr = None):
    """dz * act'(u), with PyTorch's choice at the kinks. For activations of FROM_OUTPUT `u` may be act(u) as well.

    STORED: for these, the dtype in which act(u) was stored, if u itself was not rounded to it. Then the choice is that
    of what was stored: the two bounds are the largest u that rounds to 0 and the least that rounds to 6, ties to even.

    prelu is not among them: where a gradient is wanted, PyTorch's own prelu follows a kernel without an activation.
    """
    if ACTIVATION == "relu" or ACTIVATION == "relu6" or ACTIVATION == "leaky_relu":
        # 6 less half a unit in the last place of what lies below it
        SIX: tl.constexpr = 6 - 2.0**-9 if STORED == tl.float16 else 6 - 2.0**-6 if STORED == tl.bfloat16 else 6.0
        zero = largest_zero(u, STORED)
        if ACTIVATION == "relu":
            dz = tl.where(u <= zero, 0.0, dz)
        elif ACTIVATION == "relu6":
            dz = tl.where((u <= zero) | (u >= SIX), 0.0, dz)
        else:
            dz = tl.where(u > zero, dz, dz * slope)
    elif ACTIVATION == "gelu":
        SQRT_HALF: tl.constexpr = 0.7071067811865476
        GAUSS: tl.constexpr = 0.3989422804014327  # 1 / sqrt(2 pi)
        dz = dz * (0.5 * (1.0 + tl.erf(u * SQRT_HALF)) + u * GAUSS * tl.exp(-0.5 * u * u))
    elif ACTIVATION == "gelu_tanh":
        TANH_SCALE: tl.constexpr = 1.5957691216057308
        TANH_CUBIC: tl.constexpr = 0.044715
        s = sigmoid((u + u * u * u * TANH_CUBIC) * TANH_SCALE)
        dz = dz * (s + u * s * (1.0 - s) * (1.0 + u * u * (3.0 * TANH_CUBIC)) * TANH_SCALE)
    elif ACTIVATION == "silu":
        s = sigmoid(u)
        dz = dz * (s * (1.0 + u * (1.0 - s)))
    elif ACTIVATION == "hardswish":
        dz = tl.where(u <= -3, 0.0, tl.where(u < 3, dz * (u * (1.0 / 3.0) + 0.5), dz))
    elif ACTIVATION == "mish":  # n / (n + 2) + u * 4 e^u (e^u + 1) / (n + 2)^2, n as in `activate`
        exponential = tl.exp(tl.minimum(u, 20.0))
        n = exponential * (exponential + 2.0)
        r = reciprocal(n + 2.0)
        rise = tl.where(u > 20, 0.0, 4.0 * exponential * (exponential + 1.0) * r * r)
        dz = dz * (tl.where(u > 20, 1.0, n * r) + u * rise)
    elif ACTIVATION == "hardsigmoid":
        dz = tl.where((u > -3) & (u < 3), dz * (1.0 / 6.0), 0.0)
    return dz
