"""Elementary functions against sums of 60 decimal digits, and at angles where they are exact."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest

from cnnfast.drawing.elementary import exp, log, sine_and_cosine, tangent

getcontext().prec = 60
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
ANGLES = np.concatenate([np.linspace(-721.3, 721.7, 997), np.linspace(-1, 1, 100), np.linspace(89.53, 90.4, 100)])


def sine_of(degrees: Decimal) -> Decimal:
    x = degrees % 360 * PI / 180
    total = term = x
    for k in range(2, 120, 2):
        term = -term * x * x / (k * (k + 1))
        total += term
    return total


def units_off(values: np.ndarray, exact: list[Decimal]) -> float:
    """The largest error, in units in the last place of what is exact."""
    return max(
        float(abs(Decimal(float(v)) - e) / Decimal(math.ulp(float(e)))) for v, e in zip(values, exact, strict=True)
    )


def test_exp():
    x = np.concatenate([np.linspace(-700, 700, 801), np.linspace(-2, 2, 401)])
    assert units_off(exp(x), [Decimal(float(v)).exp() for v in x]) < 1
    assert exp(np.array([0.0])).tolist() == [1]
    assert exp(np.array([709.8, 1e300])).tolist() == [math.inf, math.inf]


def test_log():
    x = np.concatenate([np.linspace(0.001, 4, 801), np.linspace(0.9, 1.1, 400), 2.0 ** np.linspace(-60, 60, 301)])
    assert units_off(log(x), [Decimal(float(v)).ln() for v in x]) < 1
    assert log(np.array([1.0, 2.0, 0.5])).tolist() == [0, math.log(2), -math.log(2)]


def test_sine_cosine_and_tangent_of_degrees():
    sines = [sine_of(Decimal(float(v))) for v in ANGLES]
    cosines = [sine_of(90 - Decimal(float(v))) for v in ANGLES]
    sine, cosine = sine_and_cosine(ANGLES)
    assert units_off(sine, sines) < 2
    assert units_off(cosine, cosines) < 2
    assert units_off(tangent(ANGLES), [s / c for s, c in zip(sines, cosines, strict=True)]) < 3


@pytest.mark.parametrize("turns", [-2, 0, 1000])
def test_right_angles_are_exact(turns):
    """A rotation by them moves pixels to pixels."""
    sine, cosine = sine_and_cosine(360.0 * turns + np.array([0.0, 90.0, 180.0, 270.0]))
    assert sine.tolist() == [0, 1, 0, -1]
    assert cosine.tolist() == [1, 0, -1, 0]


def test_the_same_bits_on_every_machine():
    """Written down where they were first computed: numpy and its vector units may differ, these may not."""
    x = np.array([0.1, 0.7, 1.3])
    assert [float(v).hex() for v in exp(x)] == EXP
    assert [float(v).hex() for v in log(x)] == LOG
    assert [float(v).hex() for v in sine_and_cosine(100 * x)[0]] == SINE


EXP = ["0x1.1aec7b35a00d4p+0", "0x1.01c2a61268987p+1", "0x1.d5ab83615f8b4p+1"]
LOG = ["-0x1.26bb1bbb55515p+1", "-0x1.6d3c324e13f50p-2", "0x1.0ca937be1b9dcp-2"]
SINE = ["0x1.63a1a7e0b7389p-3", "0x1.e11f642522d1cp-1", "0x1.8836fa2cf5039p-1"]
