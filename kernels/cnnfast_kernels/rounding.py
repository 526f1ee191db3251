"""Quotients and square roots that are rounded to nearest, as @triton.jit helpers.

On a GPU, `/` and tl.sqrt are approximations in float32, which also take subnormal operands for zero: the root of a
subnormal variance would be 0 and its inverse infinite. The interpreter computes them exactly, so that a test of results
does not see the difference. What a kernel computes for a channel, or once for an element, is rounded by these helpers.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def round_quotient(a, b):
    """a / b for a tensor b of float32 or float64. tl.div_rn takes float32 alone; in float64 `/` rounds as it does."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
@no_type_check
def round_root(x):
    """The square root of a tensor of float32 or float64. tl.sqrt_rn takes float32 alone; in float64 tl.sqrt rounds as
    it does.
    """
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
@no_type_check
def divide_again(a, b, inverse):
    """a / b in float32 for many a and one b whose `inverse` is known, rounded to nearest: three instructions where a
    quotient that is alone takes a dozen.

    What is left of a after a first quotient is exact in one fma, and its own quotient mends the first (Markstein, 1990,
    "Computation of elementary functions on the IBM RISC System/6000"). Quotients and remainders must be normal numbers.
    """
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)
