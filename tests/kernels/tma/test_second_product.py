"""A second product with which a convolution's gradient begins, by tma/dgrad.py against its definition in float64; and
who sums it.
"""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels.choosing_costs import work_of
from cnnfast_kernels.conv import dgrad_plan
from cnnfast_kernels.epilogue import BatchNorm
from cnnfast_kernels.gradient_epilogue import NO_EPILOGUE, GradientEpilogue
from cnnfast_kernels.keys import dgrad_key
from cnnfast_kernels.moments import combine_slots
from cnnfast_kernels.questions import Geometry
from cnnfast_kernels.second_product import SecondProduct
from cnnfast_kernels.tma.dgrad import second_step, slot_rows, tma_dgrad
from cnnfast_kernels.tma.tiles import BoxTile
from cnnfast_kernels.tma.views import flattened
from tests.kernels.tma.test_tma import arrange, operands, output
from tests.support.convolutions import SMALL, Case, assert_exact, needs_tensor_maps, reference
from tests.support.gradient_epilogues import assert_sums, drawn
from tests.support.poison import embed, poison

pytestmark = needs_tensor_maps

LAST = torch.channels_last
POINT = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)
# Channels that no step of 64 and no block of 64 divides; two boxes of 64 pixels.
RAGGED = Case("1x1, ragged", (2, 72, 7, 9), (40, 1, 1))
WIDE = Case("1x1, two steps of filters", (1, 24, 5, 8), (72, 1, 1))
# Of one row, of one row and half of the channels, of 8 warps, of few filters a step.
ROWS = [
    (RAGGED, BoxTile(1, 1, 64, 64, 64)),
    (RAGGED, BoxTile(1, 1, 128, 64, 128)),
    (RAGGED, BoxTile(1, 1, 128, 64, 256, 8)),
    (WIDE, BoxTile(1, 1, 64, 32, 64)),
]


def second_of(case, like, dense=True):
    """Exact in the dtype of `like`: x V of small integers, times a power of two a channel; and the float64 result.
    Vectors and matrices lie between NaN.
    """
    generator = torch.Generator().manual_seed(7)

    def integers(most: int, *size: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, size, generator=generator).to(like.device)

    C = case.x[1]
    x, own = integers(1, *case.x).to(like.dtype), integers(1, C, C, 1, 1)
    own = own * (torch.rand(own.shape, generator=generator).to(like.device) < 0.25)  # or bfloat16 would round sums
    scale, shift = (2.0 ** integers(1, C)), integers(3, C).float()
    right = torch.einsum("nihw,ci->nchw", x.double(), own.double().flatten(1))
    right = right * scale.double()[:, None, None] + shift.double()[:, None, None]
    whole = embed(own.to(like.dtype).flatten(1), (1, 0), (1, 0)).reshape(C, C, 1, 1)
    return SecondProduct(arrange(x, dense), whole, embed(scale), embed(shift)), right


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "tile"), ROWS, ids=str)
def test_alone(case, tile, dtype, device):
    _, w, dy = operands(case, device, dtype)
    second, right = second_of(case, dy)
    dx = output(case.x, dy)
    tma_dgrad(case.problem, tile, dy, w, dx, second=second)
    assert_exact(dx, reference(case, second.x, w, dy)[1] + right)


# (case, tile, what tells the mask, whether there is a residual, whether images have no gaps): a box of several rows has
# no images without gaps
BELOW = [
    (RAGGED, BoxTile(1, 1, 64, 64, 64), "y", False, True),
    (RAGGED, BoxTile(1, 1, 128, 64, 128), "y", True, True),
    (RAGGED, BoxTile(1, 1, 64, 64, 64), "words", True, True),
    (WIDE, BoxTile(1, 8, 8, 64, 64), "y", False, False),
    (RAGGED, BoxTile(2, 4, 8, 64, 64), "z", True, False),
]


@pytest.mark.parametrize(("case", "tile", "mask", "residual", "dense"), BELOW, ids=str)
def test_with_an_epilogue_and_sums(case, tile, mask, residual, dense, device):
    judged = drawn(case.x, torch.float16, device, lambda t: arrange(t, dense), mask, residual=residual)
    _, w, dy = operands(case, device, torch.float16, dense)
    second, right = second_of(case, dy, dense)
    dx, e = output(case.x, dy, dense), judged.epilogue
    images = [t for t in (dy, dx, second.x, e.residual, e.y, e.z) if t is not None]
    rows = slot_rows(flattened(case.problem, *images)[0], tile)
    slots = poison(torch.empty(rows, 1 if e.y is None else 2, case.x[1], device=device))
    tma_dgrad(case.problem, tile, dy, w, dx, None, e, slots, second)
    g, *sums = judged.judge(reference(case, second.x, w, dy)[1] + right)
    assert_exact(dx, g)
    assert_sums(combine_slots(slots, e.norm.var, centred=True), sums)


@pytest.mark.parametrize("apart", ["x", "dy"])
def test_gaps_in_one_image(apart, device):
    """Then no image is seen as one row."""
    _, w, dy = operands(RAGGED, device, torch.float16, apart != "dy")
    second, right = second_of(RAGGED, dy, apart != "x")
    dx = output(RAGGED.x, dy)
    tma_dgrad(RAGGED.problem, BoxTile(1, 8, 8, 64, 64), dy, w, dx, second=second)
    assert_exact(dx, reference(RAGGED, second.x, w, dy)[1] + right)


# ----------------------------------------------------------------------------------------------------------------------
# Plans


def asked(x_strides=None, tile=None, below=NO_EPILOGUE, sums=False, **changed):
    """A plan of meta tensors, whose second product has x of these strides."""

    def empty(*shape, dtype=torch.float16):
        return torch.empty(shape, device="meta", dtype=dtype)

    x = empty(*RAGGED.x).contiguous(memory_format=LAST)
    x = x if x_strides is None else x.as_strided(x.shape, x_strides)
    C = RAGGED.x[1]
    given = {"x": x, "own": empty(C, C, 1, 1), **dict.fromkeys(("scale", "shift"), empty(C, dtype=torch.float32))}
    second = SecondProduct(**(given | changed))
    dy, w = empty(*RAGGED.y).contiguous(memory_format=LAST), empty(*RAGGED.w)
    return dgrad_plan(dgrad_key(dy, w, RAGGED.x, LAST, POINT, False, tile, below, sums, second))


def test_who_sums_it(device):
    """Boxes where x can be seen through a tensor map, and nobody else."""
    assert asked().sums_second
    apart = asked((4536, 63, 9, 1))
    assert apart.question.why_no_boxes.startswith("a tensor is not channels_last")
    assert not apart.sums_second
    shifted = torch.empty(2 * 72 * 63 + 1, dtype=torch.float16)[1:].view(2, 7, 9, 72).permute(0, 3, 1, 2)
    assert asked(x=shifted).question.why_no_boxes == "a tensor does not start at a multiple of 16 bytes"
    by_pointers = asked(tile=SMALL)
    assert not by_pointers.sums_second
    with pytest.raises(ValueError, match="tile=32x32x16 w4 s2 is of kernels that sum no second product"):
        _ = by_pointers.prepared


@pytest.mark.parametrize(("channels", "step"), [(8, 16), (24, 16), (64, 32), (72, 64), (128, 64), (1024, 64)])
def test_two_steps_or_more(channels, step):
    """As long as a product has rows to sum. The compiler was seen to keep the boxes of one step beside others."""
    assert second_step(channels, BoxTile(1, 1, 64, 64, 64)) == step


def test_words_of_tables():
    image = torch.empty(RAGGED.x, device="meta", dtype=torch.float16)
    vector = torch.empty(72, device="meta")
    below = GradientEpilogue(None, image, norm=BatchNorm(vector, vector, vector, vector), activation="relu")
    assert asked().question.key.epilogue == "second product"
    assert asked(below=below, sums=True).question.key.epilogue == "second product relu sums"


def test_a_tile_costs_what_its_second_product_takes():
    """By pointers it is a launch more, which reads x and writes what is read again."""
    row, image = BoxTile(1, 1, 64, 64, 64), 2 * 72 * 63 * 2
    q = asked().question
    mine, plain = work_of(q, row), work_of(q._replace(second=None), row)
    assert mine.flops - plain.flops == 2 * 126 * 72 * 72
    assert mine.moved - plain.moved == mine.memory - plain.memory == image + 72 * 72 * 2
    assert mine.steps == 3 * plain.steps
    mine, plain = work_of(q, SMALL), work_of(q._replace(second=None), SMALL)
    assert (mine.launches, mine.further) == (plain.launches + 1, plain.further + 3 * image)


WRONG = {
    "second.x must have shape": {"x": torch.empty(2, 72, 7, 8, device="meta", dtype=torch.float16)},
    "second.own must have shape": {"own": torch.empty(72, 64, 1, 1, device="meta", dtype=torch.float16)},
    "second.own must be contiguous": {"own": torch.empty(72, 72, 1, 2, device="meta", dtype=torch.float16)[..., :1]},
    "second.scale must have shape": {"scale": torch.empty(72, device="meta", dtype=torch.float16)},
    "second.shift must be contiguous": {"shift": torch.empty(144, device="meta")[::2]},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError, match=message):
        asked(**WRONG[message])


@pytest.mark.parametrize(
    ("filters", "geometry"),
    [
        ((40, 1, 1), POINT._replace(stride=(2, 1))),
        ((40, 1, 1), POINT._replace(padding=(1, 1, 1, 1))),
        ((40, 3, 3), POINT._replace(padding=(1, 1, 1, 1))),
        ((40, 1, 1), POINT._replace(groups=2)),
    ],
    ids=["stride", "padding", "3x3", "groups"],
)
def test_other_convolutions(filters, geometry):
    x = torch.empty(RAGGED.x, device="meta", dtype=torch.float16)
    w = torch.empty(filters[0], 72 // geometry.groups, *filters[1:], device="meta", dtype=torch.float16)
    g = geometry.problem(x.shape, w.shape)
    dy = torch.empty(g.N, g.K, g.P, g.Q, device="meta", dtype=torch.float16)
    second = SecondProduct(x, w, x, x)
    with pytest.raises(ValueError, match="second is for the gradient of a 1x1 convolution"):
        dgrad_key(dy, w, RAGGED.x, LAST, geometry, False, None, NO_EPILOGUE, False, second)
