"""gather/fprop.py against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from cnnfast_kernels import memory
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from cnnfast_kernels.gather.fprop import fprop
from cnnfast_kernels.tiling import cdiv
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
    TILED,
    TILES,
    WHOLE_TILE,
    Case,
    arrange,
    assert_exact,
    assert_rounded_not_truncated,
    cases,
    dense_output,
    operands,
    output,
    positive_operands,
    reference,
)


def check(case, device, tile=SMALL, dtype=torch.float32, precision="ieee", layout="channels_last"):
    x, w, dy = operands(case, dtype, device, layout)
    y = dense_output(case.y, dtype, device, layout)
    fprop(case.problem, tile, precision, x, w, y)
    assert_exact(y, reference(case, x, w, dy)[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_geometry(case, device):
    check(case, device)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", [EVEN, FLAT, GROUPED], ids=str)
def test_layout(case, layout, device):
    check(case, device, layout=layout)


@pytest.mark.parametrize(("dtype", "precision"), OTHER_DTYPES)
@pytest.mark.parametrize("case", [RAGGED, STRIDED, FLAT], ids=str)
def test_dtype(case, dtype, precision, device):
    check(case, device, dtype=dtype, precision=precision)


@pytest.mark.parametrize(("precision", "tile"), TILES, ids=str)
def test_default_tile(precision, tile, device):
    check(WHOLE_TILE, device, tile, DTYPES[precision], precision)


def test_mixed_layouts(device):
    """Each tensor brings its own strides."""
    x, w, dy = operands(RAGGED, torch.float32, device, "nchw")
    y = dense_output(RAGGED.y, torch.float32, device, "nchw")
    fprop(RAGGED.problem, SMALL, "ieee", x, arrange(w, "channels_last"), y)
    assert_exact(y, reference(RAGGED, x, w, dy)[0])


@pytest.mark.parametrize("case", [STRIDED, Case("one channel", (2, 3, 5, 4), (1, 3, 3))], ids=str)
def test_contiguous_images(case, device):
    check(case, device, layout="nchw")


@pytest.mark.parametrize("layout", ["transposed", "batch_last"])
def test_a_result_that_is_not_dense_is_refused(layout, device):
    x, w, _ = operands(RAGGED, torch.float32, device)
    y = output(RAGGED.y, torch.float32, device, layout)
    with pytest.raises(ValueError, match=r"a result of shape \(1, 18, 5, 5\) must be dense, but has strides"):
        fprop(RAGGED.problem, SMALL, "ieee", x, w, y)


@SEEDED
@given(case=cases())
def test_any_geometry(case, device):
    check(case, device)


@pytest.mark.parametrize(
    "case", [TILED, GROUPED, Case("groups of several tiles", (2, 12, 7, 6), (8, 3, 3), groups=4)], ids=str
)
def test_epilogue(case, device):
    """act(batch_norm(conv + bias) + residual), and the mean and variance of each tile of what was stored."""
    x, w, dy = operands(case, torch.float32, device)
    g = case.problem
    bias, mean, weight, beta = (
        torch.arange(i, i + g.K, dtype=torch.float32, device=device) % (i + 2) - 1 for i in range(4)
    )
    norm = BatchNorm(mean, 4.0 ** (bias + 1), weight, beta, eps=0.0)  # standard deviations are powers of two: exact
    residual = arrange(dy, "nchw")
    rows = g.N * g.P * g.Q
    y = dense_output(case.y, torch.float32, device)
    moments = memory.empty((cdiv(rows, SMALL.BLOCK_M), 2, g.K), x)
    fprop(g, SMALL, "ieee", x, w, y, Epilogue(bias, norm, residual, "relu"), moments)

    column = [t.double()[:, None, None] for t in (bias, mean, norm.var, weight, beta)]
    exact = (reference(case, x, w, dy)[0] + column[0] - column[1]) / column[2].sqrt() * column[3] + column[4]
    exact = torch.relu(exact + residual.double())
    assert_exact(y, exact)
    for tile, pixels in enumerate(exact.permute(0, 2, 3, 1).reshape(rows, g.K).split(SMALL.BLOCK_M)):
        expected = torch.stack([pixels.mean(0), pixels.var(0, correction=0)])
        torch.testing.assert_close(moments[tile].double(), expected, rtol=1e-5, atol=1e-4)


def test_nan_passes(device):
    """A NaN of the input reaches the outputs whose windows hold it, through relu too, and no others."""
    x, w, dy = operands(EVEN, torch.float32, device)
    x[0, 3, 2, 2] = float("nan")
    y = dense_output(EVEN.y, torch.float32, device)
    fprop(EVEN.problem, SMALL, "ieee", x, w, y, Epilogue(activation="relu"))
    expected = torch.relu(reference(EVEN, x, w, dy)[0]).float()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_tf32_rounds(device):
    x, w, dy = positive_operands(POSITIVE, device)
    y = dense_output(POSITIVE.y, torch.float32, device)
    fprop(POSITIVE.problem, SMALL, "tf32", x, w, y)
    assert_rounded_not_truncated(y, reference(POSITIVE, x, w, dy)[0])
