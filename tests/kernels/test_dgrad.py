"""gather/dgrad.py against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from cnnfast_kernels.gather.dgrad import dgrad
from convolutions import (
    CASES,
    DTYPES,
    EVEN,
    FLAT,
    GROUPED,
    LAYOUTS,
    OTHER_DTYPES,
    POSITIVE,
    RAGGED,
    SEEDED,
    SMALL,
    STRIDED,
    TILES,
    WHOLE_TILE,
    Case,
    arrange,
    assert_exact,
    assert_rounded_not_truncated,
    cases,
    operands,
    output,
    positive_operands,
    reference,
)


def check(case, device, tile=SMALL, dtype=torch.float32, precision="ieee", layout="channels_last"):
    x, w, dy = operands(case, dtype, device, layout)
    dx = output(case.x, dtype, device, "channels_last" if layout == "expanded" else layout)
    dgrad(case.problem, tile, precision, dy, w, dx)
    assert_exact(dx, reference(case, x, w, dy)[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_geometry(case, device):
    check(case, device)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", [EVEN, STRIDED, FLAT, GROUPED], ids=str)
def test_layout(case, layout, device):
    check(case, device, layout=layout)


@pytest.mark.parametrize(("dtype", "precision"), OTHER_DTYPES)
@pytest.mark.parametrize("case", [RAGGED, STRIDED, FLAT], ids=str)
def test_dtype(case, dtype, precision, device):
    check(case, device, dtype=dtype, precision=precision)


@pytest.mark.parametrize(("precision", "tile"), TILES, ids=str)
def test_default_tile(precision, tile, device):
    check(WHOLE_TILE, device, tile, DTYPES[precision], precision)


@pytest.mark.parametrize("case", [RAGGED, STRIDED, GROUPED, Case("unseen inputs", (1, 16, 6, 5), (16, 1, 1), (2, 2))], ids=str)
def test_bias(case, device):
    """Of a transposed convolution: pixels that no tap reaches get it too."""
    x, w, dy = operands(case, torch.float32, device)
    bias = torch.arange(case.x[1], device=device).float()
    dx = output(case.x, torch.float32, device)
    dgrad(case.problem, SMALL, "ieee", dy, w, dx, bias)
    assert_exact(dx, reference(case, x, w, dy)[1] + bias.double().view(-1, 1, 1))


def test_mixed_layouts(device):
    """Each tensor brings its own strides."""
    x, w, dy = operands(STRIDED, torch.float32, device, "nchw")
    dx = output(STRIDED.x, torch.float32, device, "transposed")
    dgrad(STRIDED.problem, SMALL, "ieee", dy, arrange(w, "channels_last"), dx)
    assert_exact(dx, reference(STRIDED, x, w, dy)[1])


def test_nothing_to_differentiate(device):
    """Without outputs the gradient is zero, and written."""
    case = Case("kernel larger than the padded image", (1, 16, 3, 2), (16, 4, 2), (2, 1))
    assert case.problem.P == 0
    _, w, dy = operands(case, torch.float32, device)
    dx = output(case.x, torch.float32, device)
    dgrad(case.problem, SMALL, "ieee", dy, w, dx)
    assert_exact(dx, torch.zeros(case.x, dtype=torch.float64, device=device))


@pytest.mark.parametrize("case", [EVEN, STRIDED], ids=str)
def test_one_launch(case, device, launches):
    """All the classes of a strided convolution together."""
    check(case, device)
    assert [launch.kernel for launch in launches] == ["conv_dgrad_kernel"]


@SEEDED
@given(case=cases())
def test_any_geometry(case, device):
    check(case, device)


def test_tf32_rounds(device):
    x, w, dy = positive_operands(POSITIVE, device)
    dx = output(POSITIVE.x, torch.float32, device)
    dgrad(POSITIVE.problem, SMALL, "tf32", dy, w, dx)
    assert_rounded_not_truncated(dx, reference(POSITIVE, x, w, dy)[1])
