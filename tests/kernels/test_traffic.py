"""The bytes that operations move if they move each tensor once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cnnfast_kernels.problem import ConvProblem, pixels_met
from cnnfast_kernels.traffic import Finishing, LoopWork, fprop_traffic, least_bytes, met_pixels
from tests.support.convolutions import CASES

LOOP = LoopWork(1, 4, 1, (16, 16, 16), "half", 0, 2, False)


@given(
    outputs=st.integers(1, 12), inputs=st.integers(1, 12), taps=st.integers(1, 5),
    stride=st.integers(1, 4), pad=st.integers(0, 6), dilation=st.integers(1, 3),
)  # fmt: skip
def test_pixels_met(outputs, inputs, taps, stride, pad, dilation):
    met = [
        any(p * stride - pad + r * dilation == h for p in range(outputs) for r in range(taps)) for h in range(inputs)
    ]
    assert pixels_met(outputs, inputs, taps, stride, pad, dilation) == sum(met)


@pytest.mark.parametrize("case", [case for case in CASES if case.x[0]], ids=str)
def test_a_tensor_is_moved_once(case):
    """Pixels that reach a result have a gradient: of ones, in float64."""
    g = case.problem
    x = torch.ones(case.x, dtype=torch.float64, requires_grad=True)
    top, bottom, left, right = case.padding
    padded = F.pad(x, (left, right, top, bottom))
    w = torch.ones(case.w, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(F.conv2d(padded, w, None, case.stride, 0, case.dilation, case.groups).sum(), x)
    met = int((gradient[:, 0] != 0).sum())
    assert met_pixels(g) == met
    others = w.numel() + g.N * g.K * g.P * g.Q
    assert least_bytes(g, "fprop", 2) == least_bytes(g, "wgrad", 2) == 2 * (met * g.C + others)
    assert least_bytes(g, "dgrad", 2) == 2 * (x.numel() + others)


def test_moments_and_residuals_are_moved_too():
    g = ConvProblem.of((2, 8, 4, 4), (16, 8, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    plain = fprop_traffic(g, LOOP, 2, 3)
    results = 2 * 16 * 16 * 2
    assert (plain.outside, plain.memory - least_bytes(g, "fprop", 2), plain.launches) == (results, 0, 0)
    added = fprop_traffic(g, LOOP, 2, 3, Finishing(residual=True))
    assert (added.outside, added.memory - plain.memory, added.moved) == (2 * results, results, added.memory)
    moments = fprop_traffic(g, LOOP, 2, 3, Finishing(moments=True))
    left = 3 * 2 * 16 * 4
    assert (moments.outside, moments.moved, moments.further) == (results + left, plain.moved + left, left)
    assert (moments.memory, moments.launches) == (plain.memory, 1)
    assert fprop_traffic(g, LOOP._replace(precision="fp64"), 8, 3, Finishing(moments=True)).further == 2 * left
