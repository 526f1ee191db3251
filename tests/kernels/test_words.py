"""Words of bits: whoever leaves them, and the pass of backward that reads them, against their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnnfast_kernels import conv, devices
from cnnfast_kernels.batchnorm import activation_backward, masked_gradient, normalize, normalize_words, pack_words
from cnnfast_kernels.epilogue import PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.gather.fprop import fprop
from cnnfast_kernels.tiling import DEFAULT_TILES, SQUARE_TILE, TileConfig
from cnnfast_kernels.tma.fprop import tma_fprop
from cnnfast_kernels.tma.tiles import BoxTile
from cnnfast_kernels.words import unpack_words
from tests.support.convolutions import (
    SMALL,
    Case,
    assert_exact,
    dense_output,
    draw,
    needs_tensor_maps,
    operands,
    reference,
)
from tests.support.gradient_epilogues import pack_words as words_of
from tests.support.poison import embed, poison, poisoned_workspaces

LAST = torch.channels_last
NAN = float("nan")
# Filters and channels that fill no block; 126 pixels: a word that is not whole, and the next image's amid another.
POINTWISE = Case("1x1", (2, 72, 7, 9), (136, 1, 1))
WHOLE = Case("1x1, whole words", (2, 32, 4, 8), (64, 1, 1))
ROW = BoxTile(1, 1, 64, 64, 64)


def blank_words(z):
    """Words of `z` that nobody has written, amid others that nobody may write."""
    return embed(poison(words_of(z)), (1, 0), (1, 0))


def assert_words(words, z):
    assert torch.equal(words, words_of(z, beyond=0))
    assert words._base is None or bool((words._base[[0, -1]] == -1).all())


def written(case, tile, dtype, device, epilogue):
    """(y, words) of a kernel, which leaves both in poisoned memory."""
    x, w, _ = operands(case, dtype, device, "packed" if isinstance(tile, BoxTile) else "channels_last")
    y = dense_output(case.y, dtype, device)
    words = blank_words(y)
    if isinstance(tile, BoxTile):
        tma_fprop(case.problem, tile, x, w, y, epilogue, words, words=True)
    else:
        fprop(case.problem, tile, "half", x, w, y, epilogue, words, words=True)
    return y, words


TILES = [SMALL, *DEFAULT_TILES["half"]]
BOXES = [ROW, BoxTile(1, 1, 128, 64, 64), BoxTile(1, 1, 256, 128, 64, 8)]
BOTH = [SMALL, pytest.param(ROW, marks=needs_tensor_maps)]


@pytest.mark.parametrize(
    ("tile", "case", "dtype"),
    [
        *[(tile, POINTWISE, torch.float16) for tile in TILES],
        *[pytest.param(tile, POINTWISE, torch.bfloat16, marks=needs_tensor_maps) for tile in BOXES],
        (SMALL, WHOLE, torch.bfloat16),
        pytest.param(ROW, WHOLE, torch.float16, marks=needs_tensor_maps),
    ],
    ids=str,
)
def test_beside_a_convolution(tile, case, dtype, device):
    """Of a residual some numbers are NaN, whose bits are set. Those of pixels that do not exist are not, to which a
    norm adds as well.
    """
    addend = dense_output(case.y, dtype, device)
    addend.copy_(torch.randint(-3, 4, case.y, generator=torch.Generator().manual_seed(2)))
    addend[1, ::5, 2] = NAN
    one = torch.ones(case.filters[0], device=device)
    epilogue = Epilogue(None, BatchNorm(one * 0, one, one, one, 0.0), addend, "relu")
    y, words = written(case, tile, dtype, device, epilogue)
    exact = (reference(case, *draw(case, dtype, device))[0] + 1 + addend.double()).relu()
    assert_exact(y, exact)
    assert 0.2 < float((exact <= 0).double().mean()) < 0.8
    assert_words(words, exact)


@pytest.mark.parametrize("tile", BOTH, ids=str)
@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 2.0**-25), (torch.bfloat16, 2.0**-134)])
def test_bits_are_those_of_what_is_stored(tile, dtype, least, device):
    """Half of the least number of a dtype is stored as 0."""
    vector = torch.ones(WHOLE.filters[0], device=device)
    norm = BatchNorm(vector * 0, vector, vector * least, None, 0.0)
    y, words = written(WHOLE, tile, dtype, device, Epilogue(norm=norm, activation="relu"))
    sums = reference(WHOLE, *draw(WHOLE, dtype, device))[0]
    assert bool((sums == 1).any())
    assert torch.equal(y > 0, sums > 1)
    assert_words(words, torch.where(sums > 1, sums, 0.0))


@needs_tensor_maps
@pytest.mark.parametrize(
    ("case", "tile", "dtype", "layout", "own_pass"),
    [
        (POINTWISE, SMALL, torch.float16, LAST, False),
        (POINTWISE, ROW, torch.bfloat16, LAST, False),
        (POINTWISE, None, torch.float16, LAST, False),
        (POINTWISE, BoxTile(1, 8, 8, 64, 64), torch.float16, LAST, True),
        (POINTWISE, TileConfig(16, 32, 16), torch.float16, LAST, True),
        (POINTWISE, SMALL, torch.float16, torch.contiguous_format, True),
        (POINTWISE, None, torch.float32, LAST, True),
        (Case("groups", (2, 16, 5, 5), (8, 1, 1), groups=2), None, torch.float16, LAST, True),
        (Case("stride", (2, 16, 5, 5), (8, 1, 1), (2, 2)), None, torch.float16, LAST, True),
        (Case("padding", (1, 16, 5, 5), (8, 1, 1), padding=(1, 1, 1, 1)), None, torch.float16, LAST, True),
        (Case("3x3", (1, 16, 5, 5), (8, 3, 3)), None, torch.float16, LAST, True),
        (Case("depthwise", (2, 16, 5, 5), (16, 3, 3), groups=16), None, torch.float16, LAST, True),
        (Case("no images", (0, 16, 5, 5), (8, 1, 1)), None, torch.float16, LAST, True),
    ],
)
def test_whoever_leaves_them(case, tile, dtype, layout, own_pass, device, launches, monkeypatch):
    """The kernel of the convolution, or a pass over what it has stored: the result is the same as without them."""
    monkeypatch.setattr(devices, "gpu", lambda _: devices.Gpu("", 90))
    x, w, _ = (t.contiguous(memory_format=layout) for t in draw(case, dtype, device))
    geometry = conv.Geometry(case.stride, case.padding, case.dilation, case.groups)
    epilogue = Epilogue(activation="relu")
    without = conv.conv_fprop(x, w, geometry, epilogue, tile=tile)
    launches.clear()
    with poisoned_workspaces():
        z, words = conv.conv_fprop_words(x, w, geometry, epilogue, tile=tile)
    assert torch.equal(z, without)
    assert z.stride() == without.stride()
    assert_words(words, z)
    names = [launch.kernel for launch in launches]
    assert ("normalize_kernel" in names) == (own_pass and z.numel() > 0)


@needs_tensor_maps
def test_boxes_of_an_image_with_gaps(device, monkeypatch):
    """It is not one long row, of which each box would have whole words."""
    monkeypatch.setattr(devices, "gpu", lambda _: devices.Gpu("", 90))
    x, w, _ = (t.contiguous(memory_format=LAST) for t in draw(POINTWISE, torch.float16, device))
    x = embed(x, 0, (0, 0, 0, 1))
    geometry = conv.Geometry(POINTWISE.stride, POINTWISE.padding, POINTWISE.dilation, 1)
    z, words = conv.conv_fprop_words(x, w, geometry, Epilogue(activation="relu"), tile=ROW)
    assert_words(words, z)


@pytest.mark.parametrize("residual", [False, True])
def test_the_square_tile(residual, device, launches):
    """It has no registers left for words beside a residual."""
    x, w, dy = (t.contiguous(memory_format=LAST) for t in draw(POINTWISE, torch.float16, device))
    geometry = conv.Geometry(POINTWISE.stride, POINTWISE.padding, POINTWISE.dilation, 1)
    epilogue = Epilogue(residual=dy if residual else None, activation="relu")
    z, words = conv.conv_fprop_words(x, w, geometry, epilogue, tile=SQUARE_TILE)
    assert_words(words, z)
    assert len(launches) == (2 if residual else 1)


def test_without_an_epilogue_and_by_im2col(device):
    x, w, _ = (t.contiguous(memory_format=LAST) for t in draw(POINTWISE, torch.float16, device))
    geometry = conv.Geometry(POINTWISE.stride, POINTWISE.padding, POINTWISE.dilation, 1)
    for algorithm in ("auto", "im2col"):
        z, words = conv.conv_fprop_words(x, w, geometry, PLAIN, algorithm=algorithm)
        assert torch.equal(z, conv.conv_fprop(x, w, geometry))
        assert_words(words, z)


def test_a_key_with_words_asks_the_same_question(device):
    """Family and tile are chosen as without them."""
    x, w, _ = (t.contiguous(memory_format=LAST) for t in draw(POINTWISE, torch.float16, device))
    geometry = conv.Geometry(POINTWISE.stride, POINTWISE.padding, POINTWISE.dilation, 1)
    keys = [conv.fprop_key(x, w, geometry, PLAIN, False, False, None, words) for words in (False, True)]
    assert keys[0].question == keys[1].question
    assert conv.fprop_plan(keys[0]).tile == conv.fprop_plan(keys[1]).tile
    assert conv.fprop_plan(keys[0]) is not conv.fprop_plan(keys[1])


# ----------------------------------------------------------------------------------------------------------------------
# Passes

SHAPES = {
    "several tiles, ragged": (3, 70, 7, 9),
    "one channel": (2, 1, 5, 7),
    "2-D": (37, 5),
    "3-D": (4, 6, 11),
    "5-D": (2, 5, 3, 4, 2),
    "1x1 planes": (6, 20, 1, 1),
    "high planes of few channels": (1, 3, 20, 15),
    "no images": (0, 5, 3, 3),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Every shape, and every dtype.
CHECKS = [
    *[(shape, torch.float16) for shape in SHAPES.values()],
    *[(SHAPES["several tiles, ragged"], dtype) for dtype in DTYPES[1:]],
]


def integers(shape, dtype, device, seed=0, layout="last"):
    t = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return laid(t, layout)


def laid(t, layout):
    """A copy of `t`, cut out of NaN: with adjacent channels, or with adjacent pixels; "transposed": its pixels are in
    no order that merges.
    """
    match layout:
        case "last":
            order = [0, *range(2, t.dim()), 1]
        case "transposed":
            order = [0, 1, *range(t.dim() - 1, 1, -1)]
        case _:
            order = list(range(t.dim()))
    whole = embed(t.permute(order).contiguous(), [1, *[0] * (t.dim() - 1)], 0)
    return whole.permute([order.index(i) for i in range(t.dim())])


def special(z):
    """Puts NaN, infinities and a negative zero into z, where it has so many elements."""
    for i, value in enumerate((NAN, float("inf"), -float("inf"), -0.0)):
        z[-1:, :1].movedim(1, -1).reshape(-1)[i : i + 1] = value
        z[i : i + 1, -1:] = value
    return z


@pytest.mark.parametrize(("shape", "dtype"), CHECKS)
def test_packing(shape, dtype, device):
    z = special(integers(shape, dtype, device))
    with poisoned_workspaces():
        words = pack_words(z)
    assert_words(words, z)
    positive = unpack_words(words, z)
    assert positive.dtype == dtype
    assert torch.equal(positive, (~(z <= 0)).to(dtype))


@pytest.mark.parametrize(
    ("shape", "layout"), [((3, 70, 7, 9), "first"), ((3, 70, 7, 9), "transposed"), ((1, 3, 20, 15), "first")]
)
def test_packing_any_layout(shape, layout, device):
    """The last is one plane, whose pixels are adjacent."""
    z = special(integers(shape, torch.float16, device, layout=layout))
    assert_words(pack_words(z), z)


@pytest.mark.parametrize(("layout", "dtype"), [*[("last", dtype) for dtype in DTYPES], ("first", torch.float16)])
def test_beside_a_norm(layout, dtype, device, launches):
    """One pass where channels are adjacent, and one more over the result elsewhere."""
    shape = (3, 70, 7, 9)
    y, residual = (integers(shape, dtype, device, seed, layout) for seed in (0, 1))
    special(y)
    vectors = [integers((70,), torch.float32, device, seed, "first") for seed in range(3)]
    how = vectors[0], torch.ones(70, device=device), *vectors[1:], residual, 0.0, "relu", 0.0
    without = normalize(y, *how)
    launches.clear()
    with poisoned_workspaces():
        z, words = normalize_words(y, *how)
    torch.testing.assert_close(z, without, rtol=0, atol=0, equal_nan=True)
    assert z.stride() == without.stride()
    assert_words(words, z)
    assert len(launches) == (1 if layout == "last" else 2)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 2.0**-25), (torch.bfloat16, 2.0**-134)])
def test_a_norms_bits_are_those_of_what_is_stored(dtype, least, device):
    y = integers((2, 64, 4, 8), dtype, device)
    one = torch.ones(64, device=device)
    z, words = normalize_words(y, one * 0, one, one * least, None, None, 0.0, "relu", 0.0)
    assert torch.equal(z > 0, y > 1)
    assert_words(words, torch.where(y > 1, y, 0))


@pytest.mark.parametrize(("shape", "dtype"), CHECKS)
def test_backward(shape, dtype, device):
    """By words as by the result that they are of, and PyTorch's derivative where it is NaN too, or where the gradient
    above is infinite.
    """
    z, dz = special(integers(shape, dtype, device).relu()), integers(shape, dtype, device, 1)
    dz = torch.where(z <= 0, float("inf"), dz)
    words = words_of(z)
    with poisoned_workspaces():
        g, sums = activation_backward(dz, None, "relu", 0.0, words)
    assert g is not None
    exact = torch.ops.aten.threshold_backward(dz, z, 0)
    assert torch.equal(g, exact)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(sums.double(), exact.double().sum([0, *range(2, len(shape))]))
    by_result, _ = activation_backward(dz, z, "relu", 0.0)
    assert by_result is not None
    assert torch.equal(g, by_result)
    assert g.stride() == by_result.stride()


@pytest.mark.parametrize("layout", ["first", "transposed", "expanded"])
def test_backward_of_any_layout(layout, device):
    """Several planes, whose rows begin amid a word; "expanded": as a mean over pixels leaves it."""
    shape = (3, 70, 7, 9)
    z, dz = integers(shape, torch.float16, device), integers(shape, torch.float16, device, 1, "first")
    dz = dz[:, :, :1, :1].expand(shape) if layout == "expanded" else laid(dz, layout)
    g, sums = activation_backward(dz, z, "relu", 0.0, words_of(z))
    assert g is not None
    exact = torch.where(z > 0, dz, 0)
    assert torch.equal(g, exact)
    assert torch.equal(sums.double(), exact.double().sum((0, 2, 3)))


def test_backward_of_leaky_relu_without_sums(device):
    z, dz = (integers((2, 70, 3, 9), torch.float32, device, seed) for seed in (0, 1))
    g, sums = masked_gradient(dz, words_of(z), "leaky_relu", 0.25, sums=False)
    assert sums is None
    assert torch.equal(g, torch.ops.aten.leaky_relu_backward(dz, F.leaky_relu(z, 0.25), 0.25, True))


@pytest.mark.parametrize(
    ("message", "activation", "slope", "shape", "dtype"),
    [
        ("words must be a contiguous tensor \\(2, 16\\)", "relu", 0.0, (1, 16), torch.int32),
        ("words must be .* but is \\(2, 16\\) of torch.int64", "relu", 0.0, (2, 16), torch.int64),
        ("words must be .* strides \\(1, 2\\)", "relu", 0.0, (16, 2), torch.int32),
        ("activation='relu6' with slope=0.0 has no", "relu6", 0.0, (2, 16), torch.int32),
        ("activation='leaky_relu' with slope=-1.0", "leaky_relu", -1.0, (2, 16), torch.int32),
    ],
)
def test_what_fits_not(message, activation, slope, shape, dtype, device):
    """Words of 42 pixels of 16 channels: the third are transposed."""
    dz = torch.empty(2, 16, 3, 7, device=device)
    words = torch.empty(shape, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=message):
        activation_backward(dz, None, activation, slope, words if shape[1] == 16 else words.T)
