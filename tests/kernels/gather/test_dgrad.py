"""gather/dgrad.py against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from cnnfast_kernels.gather.dgrad import dgrad
from cnnfast_kernels.gather.im2col import im2col_dgrad
from tests.support.convolutions import (
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
    input_gradient,
    operands,
    output,
    positive_operands,
    reference,
    with_special_values,
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


@pytest.mark.parametrize(
    "case", [RAGGED, STRIDED, GROUPED, Case("unseen inputs", (1, 16, 6, 5), (16, 1, 1), (2, 2))], ids=str
)
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


# --- infinities and NaN reach what their tap reaches ------------------------------------------------------------------

WITH_OUTPUTS = [case for case in CASES if min(case.y) > 0]


@pytest.mark.parametrize("dy_too", [False, True])
@pytest.mark.parametrize("case", WITH_OUTPUTS, ids=str)
def test_special_weights(case, dy_too, device):
    """Taps of whole k-steps, in a bit each and not, and several a k-step; classes of strides; groups."""
    _, w, dy = operands(case, torch.float32, device)
    with_special_values(w, dy if dy_too else None)
    dx = output(case.x, torch.float32, device)
    dgrad(case.problem, SMALL, "ieee", dy, w, dx)
    assert_exact(dx, input_gradient(case, w, dy).to(device))


@pytest.mark.parametrize(("precision", "tile"), TILES, ids=str)
def test_special_weights_with_a_default_tile(precision, tile, device):
    _, w, dy = operands(WHOLE_TILE, DTYPES[precision], device)
    with_special_values(w)
    bias = torch.arange(WHOLE_TILE.x[1], device=device).to(w.dtype)
    dx = output(WHOLE_TILE.x, w.dtype, device)
    dgrad(WHOLE_TILE.problem, tile, precision, dy, w, dx, bias)
    exact = input_gradient(WHOLE_TILE, w, dy).to(device) + bias.double().view(-1, 1, 1)
    assert exact[:, 0].isfinite().any(), "pixels that no special weight reaches"
    assert exact.isinf().any()
    assert_exact(dx, exact)


@pytest.mark.parametrize("case", [RAGGED, STRIDED, GROUPED], ids=str)
def test_special_weights_by_im2col(case, device):
    _, w, dy = operands(case, torch.float32, device)
    with_special_values(w)
    dx = output(case.x, torch.float32, device)
    im2col_dgrad(case.problem, "ieee", dy, w, dx)
    assert_exact(dx, input_gradient(case, w, dy).to(device))


def test_padding_before_and_behind_one_class(device):
    """An image so small that taps miss dy at both of its ends, in a tile that holds several images."""
    case = Case("", (9, 8, 2, 1), (8, 3, 3), padding=(1, 1, 1, 1))
    _, w, dy = operands(case, torch.float32, device)
    with_special_values(w)
    dx = output(case.x, torch.float32, device)
    dgrad(case.problem, SMALL, "ieee", dy, w, dx)
    assert_exact(dx, input_gradient(case, w, dy).to(device))
