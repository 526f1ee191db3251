"""gather/wgrad.py against PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cnnfast_kernels import conv, memory
from cnnfast_kernels.gather.wgrad import plan_wgrad_slots, wgrad
from cnnfast_kernels.indexing import divisor
from cnnfast_kernels.operands import WgradOperands
from cnnfast_kernels.slots import ReductionOperands, empty_slots, plan_reduction
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
    dw = output(case.w, dtype, device, "channels_last" if layout == "expanded" else layout)
    wgrad(case.problem, tile, precision, x, dy, dw)
    assert_exact(dw, reference(case, x, w, dy)[2])


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


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("precision", "tile"), TILES, ids=str)
def test_default_tile(precision, tile, split, device):
    check(WHOLE_TILE, device, replace(tile, SPLIT_K=split), DTYPES[precision], precision)


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_of_an_empty_batch(algorithm, device):
    """A sum of nothing: the gradient is zero everywhere."""
    x, dy = torch.empty(0, 4, 5, 5, device=device), torch.empty(0, 3, 3, 3, device=device)
    dw = conv.conv_wgrad(x, dy, (3, 4, 3, 3), conv.Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1), algorithm=algorithm)
    assert torch.equal(dw, torch.zeros(3, 4, 3, 3, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("split", [2, 9])
def test_split(split, dtype, device):
    """RAGGED's 25 pixels are two k-steps: with nine parts, seven have nothing to add."""
    precision = {torch.float32: "ieee", torch.float64: "fp64"}.get(dtype, "half")
    check(RAGGED, device, replace(SMALL, SPLIT_K=split), dtype, precision, "transposed")


def test_workspace_dtype(device, monkeypatch):
    """Partial sums are kept in the accumulator's dtype, and only the total is rounded."""
    made = []
    allocate = memory.empty
    monkeypatch.setattr(memory, "empty", lambda *args, **kwargs: made.append(allocate(*args, **kwargs)) or made[-1])
    check(RAGGED, device, replace(SMALL, SPLIT_K=2), torch.float16, "half")
    check(RAGGED, device, replace(SMALL, SPLIT_K=2), torch.float64, "fp64")
    check(RAGGED, device)
    assert [t.dtype for t in made] == [torch.float32, torch.float64]


def test_chunks_of_a_batch(device):
    """Callers that see the pixels chunk by chunk fill one workspace, a range of slots each."""
    x, w, dy = operands(STRIDED, torch.float32, device)
    dw = output(STRIDED.w, torch.float32, device)
    slots = empty_slots(STRIDED.problem, 4, x)
    one_image = replace(STRIDED.problem, N=1)
    for i in range(2):
        image, gradient, mine = x[i : i + 1], dy[i : i + 1], slots[2 * i : 2 * i + 2]
        plan = plan_wgrad_slots(one_image, SMALL, "ieee", image, gradient, mine[0], 2, mine.stride(0))
        plan(WgradOperands(image, gradient, mine))
    plan_reduction(4, slots.stride(0), dw)(ReductionOperands(slots, dw))
    assert_exact(dw, reference(STRIDED, x, w, dy)[2])


def test_same_bits_twice(device):
    x, _, dy = positive_operands(POSITIVE, device)
    first, second = (output(POSITIVE.w, torch.float32, device) for _ in range(2))
    for dw in (first, second):
        wgrad(POSITIVE.problem, replace(SMALL, SPLIT_K=3), "ieee", x, dy, dw)
    assert torch.equal(first, second)


def test_mixed_layouts(device):
    """Each tensor brings its own strides."""
    x, w, dy = operands(RAGGED, torch.float32, device, "nchw")
    dw = output(RAGGED.w, torch.float32, device, "batch_last")
    wgrad(RAGGED.problem, SMALL, "ieee", x, arrange(dy, "channels_last"), dw)
    assert_exact(dw, reference(RAGGED, x, w, dy)[2])


@SEEDED
@given(case=cases(), split=st.integers(1, 3))
def test_any_geometry(case, split, device):
    check(case, device, replace(SMALL, SPLIT_K=split))


def test_tf32_rounds(device):
    x, w, dy = positive_operands(POSITIVE, device)
    dw = output(POSITIVE.w, torch.float32, device)
    wgrad(POSITIVE.problem, SMALL, "tf32", x, dy, dw)
    assert_rounded_not_truncated(dw, reference(POSITIVE, x, w, dy)[2])


@given(m=st.integers(0, 2**31 - 1), d=st.integers(1, 2**31 - 1))
@example(m=2**31 - 1, d=1)
@example(m=2**31 - 1, d=2**31 - 1)
@example(m=2**31 - 2, d=2**31 - 1)
@example(m=3 * 715827882 - 1, d=3)
def test_division_by_multiplication(m, d):
    """What indexing.divide computes: the high word of 2 m * magic, shifted. Neither factor has more than 32 bits."""
    magic, shift = divisor(d)
    assert 2**31 <= magic < 2**32
    assert (2 * m * magic >> 32) >> shift == m // d
