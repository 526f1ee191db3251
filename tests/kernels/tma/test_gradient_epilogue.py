"""tma/dgrad.py with an epilogue, against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels.moments import combine_slots
from cnnfast_kernels.tma.dgrad import slot_rows, tma_dgrad
from cnnfast_kernels.tma.tiles import BoxTile
from cnnfast_kernels.tma.views import flattened
from tests.kernels.tma.test_tma import PADDED, PHASES, POINTWISE, arrange, operands, output
from tests.support.convolutions import (
    Case,
    assert_exact,
    input_gradient,
    needs_tensor_maps,
    reference,
    with_special_values,
)
from tests.support.gradient_epilogues import assert_sums, drawn
from tests.support.poison import poison

pytestmark = needs_tensor_maps

RAGGED = Case("no extent a multiple of a box's", (3, 40, 9, 10), (24, 3, 3), padding=PADDED)
PROJECTION = Case("1x1 stride 2: three of four inputs unseen", (2, 64, 8, 6), (24, 1, 1), (2, 2))
UNEVEN = Case("classes of unequal size, beyond which boxes lie", (70, 64, 1, 3), (16, 1, 1), (2, 2))
SPECIAL = Case("few taps", (3, 40, 7, 8), (24, 2, 2), padding=(1, 0, 1, 0))
STRIDED = Case("few taps, stride 2", (2, 64, 10, 16), (24, 2, 3), (2, 2), (0, 0, 1, 1))
# (case, tile, what tells the mask, whether y is there too): boxes of several rows, phases, single pixels, one long row
CHECKS = [
    (RAGGED, BoxTile(1, 8, 8, 64, 64), "y", False),
    (RAGGED, BoxTile(1, 8, 8, 64, 64), "words", False),
    (RAGGED, BoxTile(2, 8, 8, 64, 256, 8), "z", True),
    (PHASES, BoxTile(2, 4, 8, 64, 64), "y", False),
    (PHASES, BoxTile(4, 8, 8, 64, 64), "words", True),
    (POINTWISE, BoxTile(1, 1, 128, 64, 128), "y", False),
    (POINTWISE, BoxTile(1, 1, 128, 64, 128), "words", False),
    (POINTWISE, BoxTile(1, 1, 64, 64, 64), "words", True),
    (PROJECTION, BoxTile(1, 8, 8, 64, 64), "y", False),
    (PROJECTION, BoxTile(1, 8, 8, 64, 64), "words", True),
    (UNEVEN, BoxTile(64, 1, 1, 64, 64), "y", False),
    (UNEVEN, BoxTile(64, 1, 1, 64, 64), "z", False),
    (UNEVEN, BoxTile(64, 1, 1, 64, 64), "words", True),
]


def check(case, tile, device, judged, dtype=torch.float16, dense=True, special=False):
    """dense: whether images have no gaps between pixels. special: whether weights are infinite or NaN."""
    x, w, dy = operands(case, device, dtype, dense)
    if special:
        with_special_values(w)
    dx = output(case.x, x, dense)
    e = judged.epilogue
    images = [t for t in (dy, dx, e.residual, e.y, e.z) if t is not None]
    rows = slot_rows(flattened(case.problem, *images)[0], tile)
    slots = poison(torch.empty(rows, 1 if e.y is None else 2, case.x[1], device=device))
    tma_dgrad(case.problem, tile, dy, w, dx, None, e, slots)
    g, *sums = judged.judge(input_gradient(case, w, dy).to(device) if special else reference(case, x, w, dy)[1])
    assert_exact(dx, g)
    assert_sums(combine_slots(slots, judged.epilogue.norm.var, centred=True), sums)


@pytest.mark.parametrize(("case", "tile", "mask", "also_y"), CHECKS, ids=str)
def test_masks(case, tile, mask, also_y, device):
    """Pixels that no tap meets get the residual, and count in the sums; those beyond the image do not."""
    check(case, tile, device, drawn(case.x, torch.float16, device, arrange, mask, also_y=also_y))


@pytest.mark.parametrize("case", [PROJECTION, POINTWISE], ids=str)
def test_slices(case, device):
    """Images with gaps between pixels, rows and images, and y without any: each is seen in phases of its own."""
    judged = drawn(case.x, torch.float16, device, lambda t: arrange(t, False), "z", also_y=True)
    y = judged.epilogue.y
    assert y is not None
    judged = judged._replace(epilogue=judged.epilogue._replace(y=arrange(y)))
    check(case, BoxTile(1, 8, 8, 64, 64), device, judged, dense=False)


def test_bfloat16(device):
    judged = drawn(PROJECTION.x, torch.bfloat16, device, arrange, "y", residual=False)
    check(PROJECTION, BoxTile(1, 8, 8, 64, 64), device, judged, torch.bfloat16)


@pytest.mark.parametrize(
    ("case", "tile", "mask"),
    [(SPECIAL, BoxTile(4, 8, 8, 64, 64), "y"), (STRIDED, BoxTile(2, 8, 8, 64, 64), "words")],
    ids=str,
)
def test_special_weights(case, tile, mask, device):
    """Boxes whose sums are NaN are summed again in parts, and each part is finished."""
    check(case, tile, device, drawn(case.x, torch.float16, device, arrange, mask, also_y=True), special=True)
