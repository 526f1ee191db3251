"""tma/stem.py against PyTorch in float64: images of few channels, packed, of small integers whose sums are exact in any
order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnfast_kernels import choosing, conv, devices, launch, questions, tables
from cnnfast_kernels.epilogue import PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.layout import dense
from cnnfast_kernels.tables import TableRow
from cnnfast_kernels.tiling import PackedTile, TileConfig
from cnnfast_kernels.tma.stem import boxed_packing, boxed_problem, is_packed
from cnnfast_kernels.tma.tiles import BoxTile, box_steps, candidate_boxes
from tests.support.convolutions import LAYOUTS, Case, draw, needs_tensor_maps, reference
from tests.support.poison import embed

pytestmark = needs_tensor_maps

PADDED = (3, 3, 3, 3)
STEM = Case("a ResNet's: 7x7 stride 2 of three channels", (2, 3, 24, 20), (64, 7, 7), (2, 2), PADDED)
SMALL = Case("3x3: eight channels a pixel", (2, 3, 8, 9), (16, 3, 3), padding=(1, 1, 1, 1))
CASES = [
    STEM,
    SMALL,
    Case("7x7 stride 2, odd image", (1, 3, 17, 21), (8, 7, 7), (2, 2), PADDED),
    Case("patches that do not overlap", (2, 3, 16, 16), (72, 4, 4), (4, 4)),
    Case("11x11 stride 4: a row of more than one block", (1, 3, 35, 39), (16, 11, 11), (4, 4), (2, 2, 2, 2)),
    Case("one channel, even kernel, padded more at one end", (1, 1, 9, 8), (8, 2, 4), padding=(0, 1, 1, 2)),
    Case("seven channels, 1x1", (2, 7, 6, 7), (8, 1, 1)),
    Case("strides differ", (2, 4, 9, 12), (8, 3, 2), (3, 2), (1, 0, 0, 1)),
    Case("dilation along H", (1, 2, 11, 9), (8, 3, 3), (2, 1), (2, 2, 1, 1), (3, 1)),
    Case("columns that no output sees", (1, 3, 10, 14), (8, 2, 2), (3, 4)),
    Case("kernel larger than the image", (1, 3, 4, 5), (8, 7, 7), (2, 2), PADDED),
]
TILE = BoxTile(1, 8, 8, 64, 32)
MOST_STEPS = 120  # of a test, which takes some milliseconds for each


def shapes(operation):
    """(case, tile): every case with every shape of box, in the smallest size."""
    found = []
    for case in CASES:
        problem = boxed_problem(case.problem)
        tiles = {(t.TILE_H, t.TILE_W): t for t in candidate_boxes(problem, operation)}
        found += [(case, tile) for tile in tiles.values() if box_steps(problem, operation, tile) <= MOST_STEPS]
    return found


def laid(t, layout):
    """A copy of `t` in that layout, with NaN behind each row, image and axis, at a multiple of 16 bytes."""
    order = LAYOUTS[layout]
    return embed(t.permute(order).contiguous(), 0, 1).permute([order.index(i) for i in range(4)])


def operands(case, device, dtype=torch.float16, x_layout="nchw", w_layout="channels_last"):
    """x, w and dy of small integers, the same in every run."""
    x, w, dy = draw(case, dtype, device)
    return laid(x, x_layout), laid(w, w_layout), dy.contiguous(memory_format=torch.channels_last)


def geometry(case):
    return conv.Geometry(case.stride, case.padding, case.dilation, case.groups)


def fprop(case, tile, x, w, epilogue=PLAIN):
    return conv.conv_fprop(x, w, geometry(case), epilogue, tile=tile)


def wgrad(case, tile, x, dy, fmt=torch.channels_last):
    return conv.conv_wgrad(x, dy, case.w, geometry(case), fmt=fmt, tile=tile)


def assert_equal(ours, exact):
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("case", "tile"), shapes("fprop"), ids=str)
def test_fprop(case, tile, device):
    x, w, dy = operands(case, device)
    assert_equal(fprop(case, tile, x, w), reference(case, x, w, dy)[0])


@pytest.mark.parametrize(("case", "tile"), shapes("wgrad"), ids=str)
def test_wgrad(case, tile, device):
    x, w, dy = operands(case, device)
    assert_equal(wgrad(case, replace(tile, SPLIT_K=2), x, dy), reference(case, x, w, dy)[2])


@pytest.mark.parametrize(
    "tile", [t for t in candidate_boxes(boxed_problem(STEM.problem), "fprop") if t.TILE_H == 8], ids=str
)
def test_every_size_of_fprop(tile, device):
    x, w, dy = operands(STEM, device)
    assert_equal(fprop(STEM, tile, x, w), reference(STEM, x, w, dy)[0])


@pytest.mark.parametrize("split", [1, 3, 16])
@pytest.mark.parametrize("fmt", [torch.channels_last, torch.contiguous_format])
def test_parts_of_the_sum_and_layouts_of_the_gradient(split, fmt, device):
    x, w, dy = operands(STEM, device)
    dw = wgrad(STEM, BoxTile(1, 8, 8, 64, 64, SPLIT_K=split), x, dy, fmt)
    assert_equal(dw, reference(STEM, x, w, dy)[2])
    assert dw.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [STEM, SMALL], ids=str)
def test_layouts_of_image_and_filters(case, layout, device):
    """One of the two is channels_last, else the result would not be."""
    x, w, dy = operands(case, device, x_layout=layout)
    exact = reference(case, x, w, dy)
    assert_equal(fprop(case, TILE, x, w), exact[0])
    assert_equal(wgrad(case, TILE, x, dy), exact[2])
    x, w, dy = operands(case, device, x_layout="channels_last", w_layout=layout)
    assert_equal(fprop(case, TILE, x, w), exact[0])


def test_bfloat16(device):
    x, w, dy = operands(STEM, device, torch.bfloat16)
    exact = reference(STEM, x, w, dy)
    assert_equal(fprop(STEM, TILE, x, w), exact[0])
    assert_equal(wgrad(STEM, TILE, x, dy), exact[2].to(torch.bfloat16))


@pytest.mark.parametrize("case", [STEM, SMALL, CASES[6]], ids=str)
def test_epilogue(case, device):
    """act(batch_norm(conv + bias) + residual)."""
    x, w, dy = operands(case, device)
    bias, mean, weight, beta = (
        torch.arange(i, i + case.filters[0], dtype=torch.float32, device=device) % (i + 2) - 1 for i in range(4)
    )
    norm = BatchNorm(mean, 4.0 ** (bias % 2), weight, beta, eps=0.0)  # standard deviations are powers of two: exact
    z = fprop(case, TILE, x, w, Epilogue(bias, norm, dy, "relu"))
    column = [t.double()[:, None, None] for t in (bias, mean, norm.var, weight, beta)]
    exact = (reference(case, x, w, dy)[0] + column[0] - column[1]) / column[2].sqrt() * column[3] + column[4]
    assert_equal(z, torch.relu(exact + dy.double()))


@pytest.mark.parametrize("case", [STEM, SMALL, CASES[6]], ids=str)
def test_statistics(case, device):
    x, w, dy = operands(case, device)
    y, mean, var = conv.conv_stats(x, w, geometry(case), tile=TILE)
    exact = reference(case, x, w, dy)[0]
    assert_equal(y, exact)
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_windows_only(value, device):
    """The zeros of a packed pixel, and those that fill a row, are not multiplied by a neighbour."""
    case = replace(STEM, padding=(0, 0, 0, 0))
    x, w, dy = operands(case, device)
    w = w.abs() + 1  # no weight is zero: what a window holds is what it gives
    w = w.contiguous(memory_format=torch.channels_last)
    x[0, 2, 9, 7] = value
    assert_equal(fprop(case, TILE, x, w), reference(case, x, w, dy)[0])


# ----------------------------------------------------------------------------------------------------------------------
# How it is packed, and when


def test_a_resnet_packed():
    """A row has 224 columns, 3 of padding on the left, 2 that a window reaches on the right, 1 to end at 16 bytes."""
    problem = conv.Geometry((2, 2), PADDED, (1, 1), 1).problem((32, 3, 224, 224), (64, 3, 7, 7))
    packing = boxed_packing(problem, torch.bfloat16)
    assert packing.image.shape == (32, 4, 224, 230)
    assert packing.filters.shape == (64, 4, 7, 8)
    assert packing.x[:2] == ((32, 28, 224, 112), (224 * 230 * 4, 1, 230 * 4, 8))
    assert packing.w[:2] == ((64, 32, 7, 1), (7 * 32, 1, 32, 32))
    g = packing.problem
    assert (g.C, g.R, g.S, g.P, g.Q, g.stride_h, g.stride_w, g.pad_h, g.pad_w) == (28, 7, 1, 112, 112, 2, 1, 3, 0)


@pytest.mark.parametrize(
    ("change", "packed"),
    [
        ({}, True),
        ({"x": (2, 4, 24, 20)}, True),
        ({"x": (2, 5, 24, 20)}, False),
        ({"x": (2, 7, 24, 20), "stride": (2, 1)}, True),
        ({"x": (2, 8, 24, 20), "stride": (2, 1)}, False),
        ({"dilation": (2, 1)}, True),
        ({"dilation": (1, 2)}, False),
        ({"x": (2, 4, 24, 20), "groups": 4}, False),
        ({"x": (2, 3, 24, 1)}, False),  # one column of outputs
        ({"x": (42000, 3, 224, 224)}, False),  # pixels are counted in 32 bits
    ],
)
def test_what_is_packed(change, packed):
    assert is_packed(replace(STEM, **change).problem) == packed


def test_pointers_serve_by_default(launches, device):
    case = replace(STEM, x=(1, 3, 32, 32))  # of which boxes would be full
    x, w, dy = operands(case, device)
    exact = reference(case, x, w, dy)
    assert_equal(conv.conv_fprop(x, w, geometry(case)), exact[0])
    assert_equal(conv.conv_wgrad(x, dy, w.shape, geometry(case)), exact[2])
    assert not any(event.kernel.startswith("tma_") for event in launches)


@pytest.fixture
def measured_row(monkeypatch):
    """Every convolution has one, and it names TILE."""
    monkeypatch.setattr(tables, "find", lambda key: TableRow(key, TILE, "kernels", {}))
    launch.forget_plans()
    yield
    launch.forget_plans()


def test_a_measured_row_names_it(measured_row, launches, device):
    x, w, dy = operands(STEM, device)
    exact = reference(STEM, x, w, dy)
    assert_equal(conv.conv_fprop(x, w, geometry(STEM)), exact[0])
    assert_equal(conv.conv_wgrad(x, dy, w.shape, geometry(STEM)), exact[2])
    assert_equal(conv.conv_dgrad(dy, w, x.shape, geometry(STEM), fmt=torch.channels_last), exact[1])
    packed = ["pack_pixels_kernel", "pack_pixels_kernel", "tma_fprop_kernel", "pack_pixels_kernel", "tma_wgrad_kernel"]
    assert [event.kernel for event in launches] == [*packed, "conv_wgrad_reduce_kernel", "conv_dgrad_kernel"]


def test_measuring_tries_it():
    x, w = (
        dense((8, 3, 224, 224), torch.float16),
        dense((64, 3, 7, 7), torch.float16, torch.channels_last),
    )
    y = dense((8, 64, 112, 112), torch.float16, torch.channels_last)
    gpu = devices.Gpu("", 90)
    forward = questions.fprop_question(x, w, geometry(STEM), gpu)
    weights = questions.wgrad_question(x, y, w.shape, torch.channels_last, geometry(STEM), gpu)
    image = questions.dgrad_question(y, w, x.shape, torch.channels_last, geometry(STEM), gpu)
    for question in (forward, weights):
        kinds = {type(tile) for tile in choosing.candidates(question)}
        assert kinds == {TileConfig, PackedTile, BoxTile}
        assert isinstance(choosing.candidates(question)[0], PackedTile)
    assert {type(tile) for tile in choosing.candidates(image)} == {TileConfig}


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (STEM, lambda x, w: (x.float(), w.float()), "operands are not in half precision"),
        (STEM, lambda x, w: (x, w.contiguous()), "a tensor is not channels_last"),  # nor is the result
        (
            replace(STEM, filters=(12, 7, 7)),
            lambda x, w: (x, w),
            "a tensor is not channels_last, with its channels and strides multiples of 8",
        ),
        (replace(STEM, dilation=(1, 2)), lambda x, w: (x, w), "a tensor is not channels_last"),
        (replace(STEM, x=(0, 3, 24, 20)), lambda x, w: (x, w), "a tensor is empty"),
    ],
    ids=["float32", "NCHW", "12 filters", "dilation along W", "no image"],
)
def test_a_tile_that_cannot_serve(case, change, reason, device):
    x, w, _ = operands(case, device)
    with pytest.raises(ValueError, match=f"which cannot serve this call: {reason}"):
        fprop(case, TILE, *change(x, w))
