"""gather/dgrad.py with an epilogue, against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels.gather.dgrad import dgrad, tile_rows
from cnnfast_kernels.moments import combine_slots
from tests.support.convolutions import (
    EVEN,
    GROUPED,
    RAGGED,
    SMALL,
    STRIDED,
    TILED,
    Case,
    arrange,
    assert_exact,
    operands,
    output,
    reference,
)
from tests.support.gradient_epilogues import drawn
from tests.support.poison import poison

PROJECTION = Case("1x1 stride 2: three of four inputs unseen", (3, 40, 6, 5), (16, 1, 1), (2, 2))
SHAPES = [EVEN, RAGGED, STRIDED, GROUPED, TILED, PROJECTION]


def slots_of(case, tile, judged, like):
    quantities = 1 if judged.epilogue.y is None else 2
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    shape = tile_rows(case.problem, tile), quantities, case.x[1]
    return poison(torch.empty(shape, dtype=accumulated, device=like.device))


def check(case, device, judged, tile=SMALL, dtype=torch.float32, precision="ieee", layout="channels_last"):
    x, w, dy = operands(case, dtype, device, layout)
    dx = output(case.x, dtype, device, layout)
    slots = slots_of(case, tile, judged, dx)
    dgrad(case.problem, tile, precision, dy, w, dx, None, judged.epilogue, slots)
    g, *sums = judged.judge(reference(case, x, w, dy)[1])
    assert_exact(dx, g)
    for ours, exact in zip(combine_slots(slots), sums, strict=True):
        if ours is not None:
            assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("mask", ["y", "z", "words"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_masks(case, mask, device):
    """From each of the three tensors: they agree, whole tiles and ragged ones, with strides and groups."""
    check(case, device, drawn(case.x, torch.float32, device, arrange, mask))
