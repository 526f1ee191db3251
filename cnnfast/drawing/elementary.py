"""exp, log, and sine, cosine and tangent of degrees, in float64, from + - * / and floor: these are rounded alike on
every machine, where the functions of C libraries and of vector units differ in their last bits.

The reductions and log are those of fdlibm (https://www.netlib.org/fdlibm); what remains is summed by Taylor's series.
Errors are below 2 units in the last place (tan: 3).
"""

from __future__ import annotations

import math

import numpy as np

LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # of ln 2 so few bits that whole multiples are exact
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")  # the rest
PER_LN2 = float.fromhex("0x1.71547652b82fep+0")
RADIANS = float.fromhex("0x1.1df46a2529d39p-6")  # pi / 180
HALF_ROOT = float.fromhex("0x1.6a09e667f3bcdp-1")  # the square root of 1/2
EXP = [1 / math.factorial(k) for k in range(14, 1, -1)]  # of x**14 to x**2
LOG = [2 / k for k in range(23, 1, -2)]  # of s**23 to s**3, without a factor s
SINE = [(-1) ** (k // 2) / math.factorial(k) for k in range(19, 1, -2)]  # of x**19 to x**3
COSINE = [(-1) ** (k // 2) / math.factorial(k) for k in range(20, 2, -2)]  # of x**20 to x**4


def polynomial(x: np.ndarray, coefficients: list[float]) -> np.ndarray:
    """The first coefficient is that of the highest power; by Horner's scheme."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def exp(x: np.ndarray) -> np.ndarray:
    """e**x; infinite above 709.78."""
    x = np.minimum(x, 800.0)
    k = np.floor(x * PER_LN2 + 0.5)
    rest = (x - k * LN2_HIGH) - k * LN2_LOW
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(1 + (rest + rest * rest * polynomial(rest, EXP)), k.astype(np.int32))


def log(x: np.ndarray) -> np.ndarray:
    """The natural logarithm of positive numbers."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < HALF_ROOT
    f = np.where(small, 2 * mantissa, mantissa) - 1
    k = exponent - small.astype(np.float64)
    s = f / (2 + f)
    square = s * s
    return k * LN2_HIGH - ((s * (f - square * polynomial(square, LOG)) - k * LN2_LOW) - f)


def quarters(degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest number of right angles, modulo 4, and sine and cosine of the rest: 90 degrees have a sine of 1."""
    turned = np.floor(degrees / 90 + 0.5)
    x = (degrees - 90 * turned) * RADIANS
    square = x * x
    half = 0.5 * square
    one = 1 - half
    cosine = one + ((1 - one - half) + square * square * polynomial(square, COSINE))
    return turned - 4 * np.floor(turned / 4), x + x * square * polynomial(square, SINE), cosine


def sine_and_cosine(degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of angles up to a million of degrees."""
    quarter, sine, cosine = quarters(degrees)
    odd = (quarter == 1) | (quarter == 3)
    of_sine, of_cosine = np.where(odd, cosine, sine), np.where(odd, sine, cosine)
    return np.where(quarter >= 2, -of_sine, of_sine), np.where((quarter == 1) | (quarter == 2), -of_cosine, of_cosine)


def tangent(degrees: np.ndarray) -> np.ndarray:
    sine, cosine = sine_and_cosine(degrees)
    return sine / cosine
