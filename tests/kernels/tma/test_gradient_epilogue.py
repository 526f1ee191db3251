"""tma/dgrad.py with an epilogue, against its definition in float64, and its tiles in the registers that they have."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels.moments import combine_slots
from cnnfast_kernels.tma.dgrad import slot_rows, tma_dgrad
from cnnfast_kernels.tma.tiles import BoxTile
from cnnfast_kernels.tma.views import flattened
from tests.kernels.tma.test_tma import ODD, PHASES, POINTWISE, RAGGED, arrange, operands, output
from tests.support.convolutions import (
    Case,
    assert_exact,
    needs_tensor_maps,
    reference,
)
from tests.support.gradient_epilogues import drawn
from tests.support.poison import poison

pytestmark = needs_tensor_maps

PROJECTION = Case("1x1 stride 2: three of four inputs unseen", (2, 64, 8, 6), (24, 1, 1), (2, 2))
SHAPES = [
    (RAGGED, BoxTile(1, 8, 8, 64, 64)),
    (RAGGED, BoxTile(64, 1, 1, 64, 64)),
    (PHASES, BoxTile(1, 8, 8, 64, 64)),
    (PHASES, BoxTile(8, 4, 4, 64, 64)),
    (ODD, BoxTile(64, 1, 1, 64, 64)),
    (POINTWISE, BoxTile(1, 1, 128, 64, 128)),
    (POINTWISE, BoxTile(1, 8, 8, 64, 64)),
    (PROJECTION, BoxTile(1, 8, 8, 64, 64)),
    (PROJECTION, BoxTile(64, 1, 1, 64, 64)),
]


def check(case, tile, device, judged, dtype=torch.float16, dense=True):
    x, w, dy = operands(case, device, dtype, dense)
    dx = output(case.x, x, dense)
    e = judged.epilogue
    images = [t for t in (dy, dx, e.residual, e.y, e.z) if t is not None]
    rows = slot_rows(flattened(case.problem, *images)[0], tile)
    slots = poison(torch.empty(rows, 1 if e.y is None else 2, case.x[1], device=device))
    tma_dgrad(case.problem, tile, dy, w, dx, None, e, slots)
    g, *sums = judged.judge(reference(case, x, w, dy)[1])
    assert_exact(dx, g)
    for ours, exact in zip(combine_slots(slots), sums, strict=True):
        if ours is not None:
            assert torch.equal(ours.double(), exact)


@pytest.mark.parametrize("mask", ["y", "z", "words"])
@pytest.mark.parametrize(("case", "tile"), SHAPES, ids=str)
def test_masks(case, tile, mask, device):
    check(case, tile, device, drawn(case.x, torch.float16, device, arrange, mask))
