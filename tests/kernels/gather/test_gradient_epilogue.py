"""gather/dgrad.py with an epilogue, against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels.epilogue import BatchNorm
from cnnfast_kernels.gather.dgrad import dgrad, tile_rows
from cnnfast_kernels.gradient_epilogue import GradientEpilogue
from cnnfast_kernels.moments import combine_slots
from cnnfast_kernels.tiling import DEFAULT_TILES, TileConfig
from tests.support.convolutions import (
    EVEN,
    OTHER_DTYPES,
    RAGGED,
    SMALL,
    STRIDED,
    TILED,
    WHOLE_TILE,
    Case,
    arrange,
    assert_exact,
    input_gradient,
    operands,
    output,
    reference,
    with_special_values,
)
from tests.support.gradient_epilogues import Judged, assert_sums, drawn
from tests.support.poison import poison

PROJECTION = Case("1x1 stride 2: three of four inputs unseen", (3, 40, 6, 5), (16, 1, 1), (2, 2))
GROUPS = Case("groups", (2, 6, 5, 5), (4, 3, 3), groups=2)
SHAPES = [EVEN, RAGGED, STRIDED, GROUPS, TILED, PROJECTION]


def check(
    case: Case,
    device: torch.device,
    judged: Judged,
    tile=SMALL,
    dtype=torch.float32,
    precision="ieee",
    layout="channels_last",
    special=False,
) -> None:
    """special: whether weights are infinite or NaN."""
    x, w, dy = operands(case, dtype, device, layout)
    if special:
        with_special_values(w)
    dx = output(case.x, dtype, device, layout)
    quantities, double = 1 if judged.epilogue.y is None else 2, dtype == torch.float64
    slots = torch.empty(tile_rows(case.problem, tile), quantities, case.x[1], device=device)
    slots = poison(slots.double() if double else slots)
    dgrad(case.problem, tile, precision, dy, w, dx, None, judged.epilogue, slots)
    dz = input_gradient(case, w, dy).to(device) if special else reference(case, x, w, dy)[1]
    g, *sums = judged.judge(dz)
    assert_exact(dx, g)
    assert_sums(combine_slots(slots, judged.epilogue.norm.var, centred=True), sums)


@pytest.mark.parametrize("mask", ["y", "z", "words"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_masks(case, mask, device):
    """From each of the three tensors: they agree. Whole tiles and ragged ones, with strides and groups; pixels that no
    tap meets get the residual, and count in the sums.
    """
    check(case, device, drawn(case.x, torch.float32, device, arrange, mask, also_y=mask == "words"))


@pytest.mark.parametrize(("dtype", "precision"), OTHER_DTYPES)
def test_dtype(dtype, precision, device):
    judged = drawn(RAGGED.x, dtype, device, arrange, "y")
    check(RAGGED, device, judged, DEFAULT_TILES[precision][0], dtype, precision)


@pytest.mark.parametrize("columns", [128, 256])
def test_pieces(columns, device):
    """A tile of so many sums is finished in pieces of its columns, 4 or 8 here."""
    case = Case("", (1, 200, 5, 5), (18, 1, 1))
    judged = drawn(case.x, torch.float16, device, arrange, "y")
    check(case, device, judged, TileConfig(64, columns, 16, 4, 2), torch.float16, "half")


def test_layout(device):
    judged = drawn(STRIDED.x, torch.float32, device, lambda t: arrange(t, "nchw"), "z", also_y=True)
    check(STRIDED, device, judged, layout="nchw")


def test_images_that_lie_otherwise(device):
    x, w, dy = operands(STRIDED, torch.float32, device)
    dx, y = output(STRIDED.x, torch.float32, device), arrange(x, "nchw")
    with pytest.raises(ValueError, match="y must have the strides of dx"):
        dgrad(STRIDED.problem, SMALL, "ieee", dy, w, dx, epilogue=GradientEpilogue(y=y, activation="relu"))


@pytest.mark.parametrize(
    ("mask", "activation", "slope"),
    [("y", "relu6", 0.0), ("z", "relu6", 0.0), ("words", "leaky_relu", 0.5), ("y", "leaky_relu", -0.5), ("y", None, 0)],
)
def test_activations(mask, activation, slope, device):
    """Without an activation there is no mask: y is there for the sums."""
    judged = drawn(RAGGED.x, torch.float32, device, arrange, mask, activation=activation, slope=slope)
    check(RAGGED, device, judged)


@pytest.mark.parametrize("case", [RAGGED, STRIDED], ids=str)
def test_special_weights(case, device):
    """Tiles whose sums are NaN are summed again, some columns at a time."""
    check(case, device, drawn(case.x, torch.float32, device, arrange, "y"), special=True)


def test_special_weights_with_a_production_tile(device):
    judged = drawn(WHOLE_TILE.x, torch.float16, device, arrange, "words", also_y=True)
    check(WHOLE_TILE, device, judged, DEFAULT_TILES["half"][0], torch.float16, "half", special=True)


def test_sums_are_those_of_what_is_stored(device):
    """The gradient is rounded to its dtype first: 2049 is 2048 in float16."""
    case = Case("", (1, 16, 8, 8), (16, 1, 1))
    dy = arrange(torch.full(case.y, 2049 / 16, device=device).half())
    dy[:, 0] = 2049 - 15 * dy[0, 1, 0, 0].item()
    w = arrange(torch.ones(case.w, device=device).half())
    dx = output(case.x, torch.float16, device)
    slots = poison(torch.empty(1, 1, 16, device=device))
    dgrad(case.problem, DEFAULT_TILES["half"][1], "half", dy, w, dx, slots=slots)
    assert torch.equal(dx, torch.full_like(dx, 2048.0))
    assert torch.equal(slots, torch.full_like(slots, 64 * 2048.0))


def test_mask_is_that_of_what_was_stored(device):
    """An argument of 2**-25 is 0 in float16, and so is the derivative there."""
    case = Case("", (1, 16, 4, 8), (16, 1, 1))
    x, w, dy = operands(case, torch.float16, device)
    y = arrange(torch.ones(case.x, device=device).half())
    y[:, :, 1] = 2
    vector = torch.ones(16, device=device)
    norm = BatchNorm(vector * 0, vector, vector * 2.0**-25, None, 0.0)
    dx = output(case.x, torch.float16, device)
    epilogue = GradientEpilogue(y=y, norm=norm, activation="relu")
    dgrad(case.problem, SMALL, "half", dy, w, dx, epilogue=epilogue)
    assert_exact(dx, torch.where(y == 2, reference(case, x, w, dy)[1], 0.0))
