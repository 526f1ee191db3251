"""gather/stem.py against PyTorch in float64: images of few channels, packed, of small integers whose sums are exact in
any order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnfast_kernels import choosing, conv, devices, launch, questions, tables
from cnnfast_kernels.epilogue import PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.gather import stem
from cnnfast_kernels.gather.stem import run_packing, why_no_packing
from cnnfast_kernels.layout import dense
from cnnfast_kernels.packed_tiles import packed, packed_wgrad_tiles
from cnnfast_kernels.tables import TableRow
from cnnfast_kernels.tiling import DEFAULT_TILES, PackedTile, TileConfig
from tests.support.convolutions import LAYOUTS, Case, arrange, draw, reference

PADDED = (3, 3, 3, 3)
STEM = Case("a ResNet's: 7x7 stride 2 of three channels", (2, 3, 12, 15), (64, 7, 7), (2, 2), PADDED)
SMALL = Case("3x3: outputs are a pixel of 4 channels apart", (2, 3, 8, 9), (16, 3, 3), padding=(1, 1, 1, 1))
WIDE = Case("3x3 of five channels: pixels of 8", (1, 5, 7, 9), (16, 3, 3), padding=(1, 1, 1, 1))
CASES = [
    STEM,
    SMALL,
    WIDE,
    Case("3x3 stride 2: as many taps as a neighbour's pixel makes whole", (2, 3, 9, 13), (32, 3, 3), (2, 2), (1,) * 4),
    Case("7x7 stride 2, odd image", (1, 3, 17, 21), (8, 7, 7), (2, 2), PADDED),
    Case("patches that do not overlap", (2, 3, 16, 16), (96, 4, 4), (4, 4)),
    Case("11x11 stride 4: a row of more than one k-step", (1, 3, 23, 27), (16, 11, 11), (4, 4), (2, 2, 2, 2)),
    Case("one channel, even kernel, padded more at one end", (1, 1, 9, 8), (8, 2, 4), padding=(0, 1, 1, 2)),
    Case("two channels, 5x5", (3, 2, 6, 7), (10, 5, 5), padding=(2, 2, 2, 2)),
    Case("four channels, strides differ", (2, 4, 9, 12), (8, 3, 2), (3, 2), (1, 0, 0, 1)),
    Case("six channels, stride 2, padded as TensorFlow pads", (1, 6, 8, 8), (16, 3, 3), (2, 2), (0, 1, 0, 1)),
    Case("seven channels, two taps", (2, 7, 6, 7), (8, 1, 2)),
    Case("eight channels, 7x7 stride 2", (1, 8, 9, 9), (8, 7, 7), (2, 2), PADDED),
    Case("taps along H only", (1, 3, 9, 6), (8, 5, 1), padding=(2, 2, 0, 0)),
    Case("dilation along H", (1, 2, 11, 9), (8, 3, 3), (2, 1), (2, 2, 1, 1), (3, 1)),
    Case("columns that no output sees", (1, 3, 10, 14), (8, 2, 2), (3, 4)),
    Case("kernel larger than the image", (1, 3, 4, 5), (8, 7, 7), (2, 2), PADDED),
    Case("one column of outputs", (2, 3, 5, 3), (8, 3, 3), (2, 2)),
]
NAN, INF = float("nan"), float("inf")
TILE = packed(TileConfig(64, 32, 32, 4, 4))
HALF_TILES = [packed(tile) for tile in DEFAULT_TILES["half"]]
FORWARD = [*HALF_TILES, packed(TileConfig(32, 32, 16, 4, 2))]
LONG, *_ = BACKWARD = [packed(tile) for tile in packed_wgrad_tiles("half", 90)]


def geometry(case):
    return conv.Geometry(case.stride, case.padding, case.dilation, case.groups)


def operands(case, device, dtype=torch.float16, x_layout="nchw", w_layout="channels_last"):
    """x, w and dy of small integers, the same in every run, cut out of memory that is full of NaN."""
    x, w, dy = draw(case, dtype, device)
    return arrange(x, x_layout), arrange(w, w_layout), arrange(dy)


def fprop(case, tile, x, w, epilogue=PLAIN, tf32=False):
    return conv.conv_fprop(x, w, geometry(case), epilogue, tile=tile, tf32=tf32)


def wgrad(case, tile, x, dy, fmt=torch.channels_last, tf32=False):
    return conv.conv_wgrad(x, dy, case.w, geometry(case), fmt=fmt, tile=tile, tf32=tf32)


def assert_equal(ours, exact):
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fprop_and_wgrad(case, device, poisoned):
    x, w, dy = operands(case, device)
    exact = reference(case, x, w, dy)
    assert_equal(fprop(case, TILE, x, w), exact[0])
    assert_equal(wgrad(case, replace(LONG, SPLIT_K=2), x, dy), exact[2])


@pytest.mark.parametrize("case", [STEM, SMALL, WIDE, CASES[3], CASES[6]], ids=str)
def test_every_tile(case, device, poisoned):
    x, w, dy = operands(case, device)
    exact = reference(case, x, w, dy)
    for tile in FORWARD:
        assert_equal(fprop(case, tile, x, w), exact[0])
    for tile in BACKWARD:
        assert_equal(wgrad(case, tile, x, dy), exact[2])


@pytest.mark.parametrize("case", [STEM, SMALL, WIDE], ids=str)
def test_tf32(case, device, poisoned):
    """Whose vectors have half as many elements. Small integers are tf32 numbers."""
    x, w, dy = operands(case, device, torch.float32)
    exact = reference(case, x, w, dy)
    for tile in map(packed, DEFAULT_TILES["tf32"]):
        assert_equal(fprop(case, tile, x, w, tf32=True), exact[0])
        assert_equal(wgrad(case, tile, x, dy, tf32=True), exact[2])


@pytest.mark.parametrize("split", [1, 3, 16])
@pytest.mark.parametrize("fmt", [torch.channels_last, torch.contiguous_format])
def test_parts_of_the_sum_and_layouts_of_the_gradient(split, fmt, device, poisoned):
    x, w, dy = operands(STEM, device)
    dw = wgrad(STEM, replace(LONG, SPLIT_K=split), x, dy, fmt)
    assert_equal(dw, reference(STEM, x, w, dy)[2])
    assert dw.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", [SMALL, CASES[3]], ids=str)
def test_layouts_of_image_and_filters(case, layout, device, poisoned):
    x, w, dy = operands(case, device, x_layout=layout)
    exact = reference(case, x, w, dy)
    assert_equal(fprop(case, TILE, x, w), exact[0])
    assert_equal(wgrad(case, TILE, x, dy), exact[2])
    if layout != "expanded":
        x, w, dy = operands(case, device, w_layout=layout)
        dy = arrange(dy, layout)
        assert_equal(fprop(case, TILE, x, w), exact[0])
        assert_equal(wgrad(case, TILE, x, dy), exact[2])


def test_bfloat16(device, poisoned):
    x, w, dy = operands(STEM, device, torch.bfloat16)
    exact = reference(STEM, x, w, dy)
    assert_equal(fprop(STEM, TILE, x, w), exact[0])
    assert_equal(wgrad(STEM, TILE, x, dy), exact[2].to(torch.bfloat16))


@pytest.mark.parametrize("case", [STEM, SMALL, WIDE], ids=str)
def test_epilogue(case, device, poisoned):
    """act(batch_norm(conv + bias) + residual)."""
    x, w, dy = operands(case, device)
    bias, mean, weight, beta = (
        torch.arange(i, i + case.filters[0], dtype=torch.float32, device=device) % (i + 2) - 1 for i in range(4)
    )
    norm = BatchNorm(mean, 4.0 ** (bias % 2), weight, beta, eps=0.0)  # standard deviations are powers of two: exact
    z = fprop(case, HALF_TILES[0], x, w, Epilogue(bias, norm, dy, "relu"))
    column = [t.double()[:, None, None] for t in (bias, mean, norm.var, weight, beta)]
    exact = (reference(case, x, w, dy)[0] + column[0] - column[1]) / column[2].sqrt() * column[3] + column[4]
    assert_equal(z, torch.relu(exact + dy.double()))


@pytest.mark.parametrize("case", [STEM, SMALL, WIDE], ids=str)
def test_statistics(case, device, poisoned):
    x, w, dy = operands(case, device)
    y, mean, var = conv.conv_stats(x, w, geometry(case), tile=HALF_TILES[0])
    exact = reference(case, x, w, dy)[0]
    assert_equal(y, exact)
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "value"), [(STEM, NAN), (STEM, INF), (SMALL, INF), (WIDE, NAN), (CASES[3], INF), (CASES[6], NAN)], ids=str
)
def test_what_is_not_finite_reaches_its_windows_only(case, value, device, poisoned):
    """A neighbour's pixel, which makes a row of taps whole vectors, has weights of zero and is not multiplied by
    them.
    """
    case = replace(case, padding=(0, 0, 0, 0), x=(1, *case.x[1:]))
    x, w, dy = operands(case, device)
    w = (w.abs() + 1).contiguous(memory_format=torch.channels_last)  # what a window holds is what it gives
    *_, H, W = x.shape
    x[0, 2, H // 2, W // 2] = value
    x[-1, 0, 0, 1] = -value
    exact = reference(case, x, w, dy)
    assert not exact[0].isfinite().all()
    for tile in (TILE, HALF_TILES[0], packed(TileConfig(32, 32, 16, 4, 2))):
        assert_equal(fprop(case, tile, x, w), exact[0])
    assert_equal(wgrad(case, TILE, x, dy), exact[2])


def test_weights_that_are_not_finite_reach_their_filters_only(device):
    x, w, dy = operands(STEM, device)
    w[3, 1, 6, 6], w[5, 2, 0, 0] = INF, NAN
    y = fprop(STEM, TILE, x, w)
    others = [k for k in range(64) if k not in (3, 5)]
    assert y[:, others].isfinite().all()
    assert_equal(y[:, others], reference(STEM, x, w, dy)[0][:, others])
    assert y[:, 5].isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# How it is packed, and when


def test_a_resnet_packed():
    """A window has 7 pixels of 4 channels, and one of its neighbour's."""
    problem = conv.Geometry((2, 2), PADDED, (1, 1), 1).problem((32, 3, 224, 224), (64, 3, 7, 7))
    packing = run_packing(problem, torch.bfloat16)
    assert packing.image.shape == (32, 4, 224, 230)
    assert packing.filters.shape == (64, 4, 7, 8)
    assert packing.x[:2] == ((32, 32, 224, 112), (224 * 230 * 4, 1, 230 * 4, 8))
    assert packing.w[:2] == ((64, 32, 7, 1), (7 * 32, 1, 32, 32))
    g = packing.problem
    assert (g.C, g.R, g.S, g.P, g.Q, g.stride_h, g.stride_w, g.pad_h, g.pad_w) == (32, 7, 1, 112, 112, 2, 1, 3, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_read_lies_in_what_is_packed(case, dtype):
    """The last element of the last window of the last row, of the image and of the filters."""
    packing = run_packing(case.problem, dtype)
    for view, allocated in ((packing.x, packing.image), (packing.w, packing.filters)):
        last = sum((extent - 1) * stride for extent, stride in zip(view.shape, view.strides, strict=True))
        elements = allocated.shape[0] * allocated.strides[0]
        assert last < elements
    assert packing.problem.C <= packing.w.shape[1]


@pytest.mark.parametrize(
    ("change", "precision", "reason"),
    [
        ({}, "half", ""),
        ({}, "tf32", ""),
        ({}, "ieee", "there are no tensor cores for these operands"),
        ({}, "fp64", "there are no tensor cores for these operands"),
        ({"x": (2, 8, 24, 20)}, "half", ""),
        ({"x": (2, 9, 24, 20)}, "half", "9 channels are too many for a packed pixel"),
        ({"dilation": (2, 1)}, "half", ""),
        ({"dilation": (1, 2)}, "half", "there are gaps between the taps of a row"),
        ({"filters": (64, 1, 1)}, "half", "there is one tap only"),
        ({"x": (2, 4, 24, 20), "groups": 4}, "half", "there are groups"),
        ({"x": (0, 3, 24, 20)}, "half", "a tensor is empty"),
        ({"x": (42000, 3, 224, 224)}, "half", "the packed image would have more than 2147482624 pixels"),
    ],
)
def test_what_is_packed(change, precision, reason):
    dtype = torch.float16 if precision == "half" else torch.float32
    assert why_no_packing(replace(STEM, **change).problem, precision, dtype) == reason


def question(operation="fprop", x=(8, 3, 224, 224), dtype=torch.float16, fmt=torch.channels_last, **more):
    case = replace(STEM, x=x, **more)
    image, filters = dense(case.x, dtype, fmt), dense(case.w, dtype, torch.channels_last)
    y, gpu, where = dense(case.y, dtype, torch.channels_last), devices.Gpu("", 80), geometry(case)
    if operation == "fprop":
        return questions.fprop_question(image, filters, where, gpu)
    return questions.wgrad_question(image, y, filters.shape, torch.channels_last, where, gpu)


@pytest.mark.parametrize(
    ("options", "tile"),
    [
        ({}, "packed 128x64x32 w4 s4"),
        ({"fmt": torch.contiguous_format}, "packed 128x64x32 w4 s4"),
        ({"filters": (32, 3, 3)}, "packed 64x32x32 w4 s4"),
        ({"operation": "wgrad"}, "packed 64x128x32 w4 s4 split 64"),
        ({"operation": "wgrad", "filters": (32, 3, 3)}, "packed 64x64x32 w4 s4 split 64"),
        ({"operation": "wgrad", "filters": (32, 1, 2)}, "packed 64x32x32 w4 s4 split 64"),
        ({"dtype": torch.float32}, "64x32x16 w4 s3"),
        ({"x": (1, 3, 128, 128)}, "64x32x32 w4 s4"),  # few outputs
        ({"x": (8, 4, 224, 224)}, "64x64x32 w4 s4"),  # vectors as it lies
        ({"x": (8, 4, 224, 224), "fmt": torch.contiguous_format}, "packed 128x64x32 w4 s4"),
        ({"x": (8, 8, 224, 224)}, "64x64x32 w4 s4"),
        ({"x": (8, 6, 224, 224)}, "packed 128x64x32 w4 s4"),
    ],
)
def test_the_default(options, tile):
    q = question(**options)
    assert str(choosing.default_tile(q)) == tile


@pytest.mark.parametrize("operation", ["fprop", "wgrad"])
def test_measuring_tries_both(operation):
    tiles = choosing.candidates(question(operation))
    assert {type(tile) for tile in tiles} == {TileConfig, PackedTile}
    assert isinstance(tiles[0], PackedTile)
    q = question(operation)
    small = question(operation, x=(1, 3, 32, 32))
    assert {type(tile) for tile in choosing.candidates(small)} == {TileConfig, PackedTile}
    assert all(choosing._can_run(tile, q) for tile in tiles)


@pytest.fixture
def all_images_are_large(monkeypatch):
    monkeypatch.setattr(stem, "LEAST_OUTPUTS", 1)
    launch.forget_plans()
    yield
    launch.forget_plans()


def test_it_serves_large_images_by_default(all_images_are_large, launches, device):
    x, w, dy = operands(SMALL, device)
    exact = reference(SMALL, x, w, dy)
    assert_equal(conv.conv_fprop(x, w, geometry(SMALL)), exact[0])
    assert_equal(conv.conv_wgrad(x, dy, w.shape, geometry(SMALL)), exact[2])
    assert [event.kernel for event in launches] == [
        *["pack_pixels_kernel"] * 2,
        "conv_fprop_kernel",
        "pack_pixels_kernel",
        "conv_wgrad_kernel",
        "conv_wgrad_reduce_kernel",
    ]


@pytest.fixture
def measured_row(monkeypatch):
    """Every convolution has one, and it names TILE."""
    monkeypatch.setattr(tables, "find", lambda key: TableRow(key, TILE, "kernels", {}))
    launch.forget_plans()
    yield
    launch.forget_plans()


def test_a_measured_row_names_it(measured_row, launches, device):
    """Where it cannot run, as in a gradient of the image, the default does."""
    x, w, dy = operands(SMALL, device)
    exact = reference(SMALL, x, w, dy)
    assert_equal(conv.conv_fprop(x, w, geometry(SMALL)), exact[0])
    assert_equal(conv.conv_wgrad(x, dy, w.shape, geometry(SMALL)), exact[2])
    assert_equal(conv.conv_dgrad(dy, w, x.shape, geometry(SMALL), fmt=torch.channels_last), exact[1])
    packs = ["pack_pixels_kernel", "pack_pixels_kernel", "conv_fprop_kernel", "pack_pixels_kernel", "conv_wgrad_kernel"]
    assert [event.kernel for event in launches] == [*packs, "conv_wgrad_reduce_kernel", "conv_dgrad_kernel"]
    many = replace(SMALL, x=(1, 9, 5, 6))
    x, w, dy = operands(many, device)
    assert_equal(conv.conv_fprop(x, w, geometry(many)), reference(many, x, w, dy)[0])
    assert not isinstance(launches[-1].tile, PackedTile)


def test_a_tile_that_cannot_serve(device):
    case = replace(STEM, x=(2, 9, 14, 18))
    x, w, dy = operands(case, device)
    with pytest.raises(ValueError, match="is for a packed image, which cannot serve this call: 9 channels are too"):
        fprop(case, TILE, x, w)
    with pytest.raises(ValueError, match=r"packed 64x32x32 w4 s4 is for .*: there is no image to pack"):
        conv.conv_dgrad(dy, w, x.shape, geometry(case), tile=TILE)


def test_rows_say_which_form_ran():
    """A row of a TileConfig means the image as it lies."""
    key = question().key
    for tile in (TILE, TileConfig(64, 32, 32, 4, 4)):
        written = TableRow(key, tile, "kernels", {"kernels": 1.0})
        read = TableRow.from_dict(key.gpu, key.arch, written.to_dict())
        assert read == written
        assert type(read.tile) is type(tile)
