"""tma/ against PyTorch in float64: production tiles on small problems, of small integers whose sums are exact in any
order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from cnnfast_kernels import conv, devices, launch, memory
from cnnfast_kernels.activations import ACTIVATIONS
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from cnnfast_kernels.moments import combine
from cnnfast_kernels.tiling import TileConfig
from cnnfast_kernels.tma.dgrad import tma_dgrad
from cnnfast_kernels.tma.fprop import box_rows, tma_fprop
from cnnfast_kernels.tma.tiles import BoxTile, box_steps, candidate_boxes
from cnnfast_kernels.tma.views import flattened
from cnnfast_kernels.tma.wgrad import tma_wgrad
from tests.support.convolutions import (
    Case,
    assert_exact,
    draw,
    input_gradient,
    needs_tensor_maps,
    reference,
    with_special_values,
)
from tests.support.poison import embed, poison

pytestmark = needs_tensor_maps

PADDED = (1, 1, 1, 1)
RAGGED = Case("no extent a multiple of a box's", (3, 40, 9, 10), (72, 3, 3), padding=PADDED)
PHASES = Case("stride 2, whole phases", (2, 64, 12, 20), (64, 3, 3), (2, 2), PADDED)
ODD = Case("stride 2, odd image", (5, 24, 7, 9), (16, 3, 3), (2, 2), PADDED)
POINTWISE = Case("1x1: a plain GEMM", (2, 72, 7, 9), (136, 1, 1))
CASES = [
    RAGGED,
    PHASES,
    ODD,
    POINTWISE,
    Case("1x1 stride 2: three of four inputs unseen", (2, 64, 8, 6), (24, 1, 1), (2, 2)),
    Case("strides differ", (2, 32, 9, 8), (16, 3, 2), (3, 2), (1, 0, 0, 1)),
    Case("stride larger than the kernel: inputs that no output sees", (2, 32, 9, 9), (16, 2, 2), (3, 3)),
    Case("dilation", (2, 16, 9, 9), (16, 3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Case("stride and dilation share a factor", (1, 64, 12, 10), (16, 4, 3), (4, 2), (3, 3, 2, 2), (2, 4)),
    Case("stride and dilation without a common factor", (1, 64, 12, 12), (16, 4, 3), (2, 3), (3, 3, 2, 2), (3, 2)),
    Case("even kernel, padded to the same size: more at one end", (1, 16, 5, 6), (16, 2, 4), padding=(0, 1, 1, 2)),
    Case("padding wider than the kernel: outputs that see only zeros", (1, 8, 3, 3), (8, 2, 2), padding=(4, 3, 3, 4)),
    Case("kernel larger than the image", (1, 16, 2, 3), (16, 5, 5), padding=(2, 2, 2, 2)),
    Case("one row", (3, 16, 1, 21), (16, 1, 3), padding=(0, 0, 1, 1)),
]


MOST_STEPS = 100  # of a test, which takes some milliseconds for each


def shapes(operation):
    """(case, tile): every case with every shape of box, in the smallest size."""
    found = []
    for case in CASES:
        tiles = {(t.TILE_H, t.TILE_W): t for t in candidate_boxes(case.problem, operation)}
        found += [(case, tile) for tile in tiles.values() if box_steps(case.problem, operation, tile) <= MOST_STEPS]
    return found


def sizes(operation):
    """Every tile that a convolution of whole phases may get, but for boxes of a few pixels of its two images."""
    return [
        tile
        for tile in candidate_boxes(PHASES.problem, operation)
        if box_steps(PHASES.problem, operation, tile) <= MOST_STEPS
    ]


def arrange(t, dense=True):
    """`t` as channels_last, cut out of a larger tensor of NaN: from its images, or from all of its axes."""
    before = (1, 0, 0, 0) if dense else (1, 1, 1, 8)
    return embed(t.permute(0, 2, 3, 1).contiguous(), before, before).permute(0, 3, 1, 2)


def operands(case, device, dtype=torch.float16, dense=True):
    """x, w and dy of small integers, the same in every run."""
    return [arrange(t, dense) for t in draw(case, dtype, device)]


def output(shape, like, dense=True):
    return arrange(poison(torch.empty(shape, dtype=like.dtype, device=like.device)), dense)


def check_fprop(case, tile, device, dense=True, dtype=torch.float16):
    x, w, dy = operands(case, device, dtype, dense)
    y = output(case.y, x, dense)
    tma_fprop(case.problem, tile, x, w, y)
    assert_exact(y, reference(case, x, w, dy)[0])


def check_dgrad(case, tile, device, dense=True, dtype=torch.float16):
    x, w, dy = operands(case, device, dtype, dense)
    dx = output(case.x, x, dense)
    tma_dgrad(case.problem, tile, dy, w, dx)
    assert_exact(dx, reference(case, x, w, dy)[1])


def check_wgrad(case, tile, device, dense=True, dtype=torch.float16):
    x, w, dy = operands(case, device, dtype, dense)
    dw = output(case.w, x, dense)
    tma_wgrad(case.problem, tile, x, dy, dw)
    assert_exact(dw, reference(case, x, w, dy)[2])


@pytest.mark.parametrize(("case", "tile"), shapes("fprop"), ids=str)
def test_fprop(case, tile, device):
    check_fprop(case, tile, device)


@pytest.mark.parametrize(("case", "tile"), shapes("dgrad"), ids=str)
def test_dgrad(case, tile, device):
    check_dgrad(case, tile, device)


SPECIAL = [
    (case, tile)
    for case, tile in shapes("dgrad")
    if box_steps(case.problem, "dgrad", tile) * tile.pixels <= 3000 or (tile.TILE_H, tile.TILE_W) == (8, 8)
]


@pytest.mark.parametrize(("case", "tile"), SPECIAL, ids=str)
def test_special_weights_reach_what_their_taps_reach(case, tile, device):
    """Boxes of one pixel, whose taps are skipped, of rows, of rows and columns, with phases and without; some have NaN
    in dy too.
    """
    _, w, dy = operands(case, device)
    with_special_values(w, dy if tile.TILE_W > 1 else None)
    dx = output(case.x, dy)
    tma_dgrad(case.problem, tile, dy, w, dx)
    assert_exact(dx, input_gradient(case, w, dy).to(device))


@pytest.mark.parametrize("tile", [BoxTile(4, 8, 8, 64, 64), BoxTile(2, 8, 8, 64, 128)], ids=str)
def test_special_weights_of_a_transposed_convolution(tile, device):
    """Boxes that are taken in parts; the bias is added to each."""
    case = PHASES if tile.TILE_C == 64 else RAGGED
    _, w, dy = operands(case, device)
    with_special_values(w)
    bias = torch.arange(case.x[1], device=device).half()
    dx = output(case.x, dy)
    tma_dgrad(case.problem, tile, dy, w, dx, bias)
    assert_exact(dx, input_gradient(case, w, dy).to(device) + bias.double().view(-1, 1, 1))


@pytest.mark.parametrize(("case", "tile"), shapes("wgrad"), ids=str)
def test_wgrad(case, tile, device):
    check_wgrad(case, tile, device)


@pytest.mark.parametrize("tile", sizes("fprop"), ids=str)
def test_every_tile_of_fprop(tile, device):
    check_fprop(PHASES, tile, device)


@pytest.mark.parametrize("tile", sizes("dgrad"), ids=str)
def test_every_tile_of_dgrad(tile, device):
    check_dgrad(PHASES, tile, device)


@pytest.mark.parametrize("tile", sizes("wgrad"), ids=str)
def test_every_tile_of_wgrad(tile, device):
    check_wgrad(PHASES, replace(tile, SPLIT_K=2), device)


@pytest.mark.parametrize("check", [check_fprop, check_dgrad, check_wgrad])
@pytest.mark.parametrize("case", [RAGGED, PHASES, POINTWISE], ids=str)
def test_slices(case, check, device):
    """Tensors with gaps between pixels, rows and images; those of a 1x1 convolution are then no single row."""
    check(case, BoxTile(1, 8, 8, 64, 64), device, dense=False)


@pytest.mark.parametrize("check", [check_fprop, check_dgrad, check_wgrad])
def test_bfloat16(check, device):
    check(RAGGED, BoxTile(1, 8, 8, 64, 64), device, dtype=torch.bfloat16)


@pytest.mark.parametrize("split", [1, 3, 16])
def test_split(split, device):
    """A tap meets 12 boxes at most: of 16 parts some have nothing to add."""
    check_wgrad(Case("", (3, 8, 9, 9), (8, 1, 2)), BoxTile(1, 8, 8, 64, 64, SPLIT_K=split), device)


def test_wgrad_of_any_layout(device):
    x, w, dy = operands(RAGGED, device)
    dw = embed(poison(torch.empty(RAGGED.w, dtype=x.dtype, device=device)))
    tma_wgrad(RAGGED.problem, BoxTile(64, 1, 1, 64, 64, SPLIT_K=2), x, dy, dw)
    assert_exact(dw, reference(RAGGED, x, w, dy)[2])


@pytest.mark.parametrize(
    "tile", [BoxTile(2, 8, 8, 64, 64), BoxTile(2, 4, 8, 128, 32), BoxTile(4, 4, 4, 64, 64)], ids=str
)
@pytest.mark.parametrize("case", [RAGGED, POINTWISE], ids=str)
def test_epilogue(case, tile, device):
    """act(batch_norm(conv + bias) + residual), and the moments of what was stored, over boxes that reach beyond the
    tensor.
    """
    x, w, dy = operands(case, device)
    g = case.problem
    bias, mean, weight, beta = (
        torch.arange(i, i + g.K, dtype=torch.float32, device=device) % (i + 2) - 1 for i in range(4)
    )
    norm = BatchNorm(mean, 4.0 ** (bias % 2), weight, beta, eps=0.0)  # standard deviations are powers of two: exact
    y = output(case.y, x)
    rows = box_rows(flattened(g, x, y)[0], tile)
    moments = memory.empty((rows.tiles, 2, g.K), x, dtype=torch.float32)
    tma_fprop(g, tile, x, w, y, Epilogue(bias, norm, dy, "relu"), moments)

    column = [t.double()[:, None, None] for t in (bias, mean, norm.var, weight, beta)]
    exact = (reference(case, x, w, dy)[0] + column[0] - column[1]) / column[2].sqrt() * column[3] + column[4]
    exact = torch.relu(exact + dy.double())
    assert_exact(y, exact)
    means, variances = combine(moments, rows)
    torch.testing.assert_close(means.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variances.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5)


# Production tiles, for images (N, P, Q) that their boxes divide, and that they do not divide along one axis.
MOMENTS = [
    (BoxTile(1, 1, 128, 128, 64), (1, 1, 256), (1, 1, 200)),
    (BoxTile(4, 8, 4, 128, 64), (4, 16, 8), (5, 8, 8), (4, 15, 8), (8, 8, 7)),
    (BoxTile(4, 8, 8, 64, 64, num_stages=4), (4, 8, 16), (3, 8, 8)),
    (BoxTile(128, 1, 1, 64, 64, num_stages=4), (128, 2, 1), (100, 1, 2)),
]


@pytest.mark.parametrize(("tile", "image"), [(tile, image) for tile, *images in MOMENTS for image in images], ids=str)
def test_moments_of_ragged_boxes(tile, image, device):
    """Box by box, and those of a bias that is far larger than the deviations: pixels of y that no image has are it."""
    N, P, Q = image
    case = Case("", (N, 16, P, Q), (tile.TILE_K + 8, 1, 1))
    x, w, dy = operands(case, device, dense=False)  # which are no single row then
    y = output(case.y, x, dense=False)
    bias = torch.full((case.y[1],), 256.0, device=device)
    rows = box_rows(case.problem, tile)
    moments = memory.empty((rows.tiles, 2, case.y[1]), x, dtype=torch.float32)
    tma_fprop(case.problem, tile, x, w, y, Epilogue(bias), moments)
    exact = reference(case, x, w, dy)[0] + 256
    boxes = [
        part.permute(0, 2, 3, 1).reshape(-1, case.y[1])
        for images in exact.split(tile.TILE_N)
        for lines in images.split(tile.TILE_H, 2)
        for part in lines.split(tile.TILE_W, 3)
    ]
    expected = torch.stack([torch.stack([box.mean(0), box.var(0, correction=0)]) for box in boxes])
    torch.testing.assert_close(moments.double(), expected, rtol=4e-6, atol=0)  # the least variance is 10 or so


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in (None, "relu")])
def test_activations(activation, device):
    """As gather/'s kernels, which have the same epilogue and the same sums."""
    x, w, _ = operands(Case("", (1, 16, 8, 8), (64, 1, 1)), device)
    slopes = torch.linspace(-1, 1, 64, device=device).to(x.dtype) if activation == "prelu" else None
    ours, theirs = (
        conv.conv_fprop(
            x,
            w / 4,
            conv.Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1),
            Epilogue(activation=activation, slope=0.1, slopes=slopes),
            tile=tile,
        )
        for tile in (BoxTile(1, 8, 8, 64, 64), TileConfig(64, 32, 32))
    )
    assert torch.equal(ours, theirs)


def test_bias_of_a_transposed_convolution(device):
    x, w, dy = operands(PHASES, device)
    bias = torch.arange(PHASES.x[1], dtype=torch.float32, device=device) % 5
    dx = output(PHASES.x, x)
    tma_dgrad(PHASES.problem, BoxTile(1, 8, 8, 64, 64), dy, w, dx, bias)
    assert_exact(dx, reference(PHASES, x, w, dy)[1] + bias.double()[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_near_to_float64_as_pytorch(dtype, device):
    case = Case("a long sum", (1, 136, 8, 8), (16, 3, 3), padding=PADDED)
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (
        arrange(torch.randn(shape, generator=generator).to(device, dtype)) for shape in (case.x, case.w, case.y)
    )
    leaves = [t.contiguous().requires_grad_() for t in (x, w)]
    theirs = torch.nn.functional.conv2d(*leaves, padding=1)
    theirs = [theirs.detach(), *torch.autograd.grad(theirs, leaves, dy.contiguous())]
    ours = [output(t.shape, x) for t in theirs]
    tile = BoxTile(1, 8, 8, 64, 64)
    tma_fprop(case.problem, tile, x, w, ours[0])
    tma_dgrad(case.problem, tile, dy, w, ours[1])
    tma_wgrad(case.problem, replace(tile, SPLIT_K=4), x, dy, ours[2])
    for mine, other, exact in zip(ours, theirs, reference(case, x, w, dy), strict=True):
        assert (mine.double() - exact).abs().max() <= 2 * (other.double() - exact).abs().max()
        assert (mine.double() - exact).square().mean() <= 2 * (other.double() - exact).square().mean()


def test_nan_passes(device):
    """A NaN reaches the pixels whose windows hold it, through relu too, and no others."""
    case, tile = replace(RAGGED, padding=(0, 0, 0, 0)), BoxTile(1, 8, 8, 64, 64)
    x, w, dy = operands(case, device)
    x[0, 3, 2, 2] = dy[0, 3, 2, 2] = float("nan")
    y, dx = output(case.y, x), output(case.x, x)
    tma_fprop(case.problem, tile, x, w, y, Epilogue(activation="relu"))
    tma_dgrad(case.problem, tile, dy, w, dx)
    exact = reference(case, x, w, dy)
    torch.testing.assert_close(y, torch.relu(exact[0]).half(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dx, exact[1].half(), rtol=0, atol=0, equal_nan=True)


def test_same_bits_twice(device):
    x, _, dy = (t / 3 for t in operands(RAGGED, device))
    first, second = (output(RAGGED.w, x) for _ in range(2))
    for dw in (first, second):
        tma_wgrad(RAGGED.problem, BoxTile(4, 4, 4, 64, 64, SPLIT_K=3), x, dy, dw)
    assert torch.equal(first, second)


@pytest.mark.skipif(not launch.INTERPRETED, reason="GPU ring: products are counted in the interpreter")
@pytest.mark.parametrize("check", [check_fprop, check_dgrad, check_wgrad])
@pytest.mark.parametrize(
    "tile", [BoxTile(64, 1, 1, 64, 64), BoxTile(4, 1, 16, 64, 64), BoxTile(1, 8, 8, 64, 64)], ids=str
)
@pytest.mark.parametrize("stride", [1, 2])
def test_steps_are_those_that_the_choice_reckons_with(stride, tile, check, device, monkeypatch):
    """No more than that: single pixels, rows and columns skip the taps that see padding."""
    case = Case("", (3, 128, 4, 6), (40, 3, 3), (stride, stride), PADDED)
    products, create_dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: (products.append(1), create_dot(*args))[1])
    check(case, tile, device)
    operation = {check_fprop: "fprop", check_dgrad: "dgrad", check_wgrad: "wgrad"}[check]
    assert len(products) == box_steps(case.problem, operation, tile)


def test_a_tile_that_cannot_step_with_the_stride(device):
    x, w, dy = operands(ODD, device)
    tile = BoxTile(1, 8, 8, 64, 32)
    for call in (lambda: tma_fprop(ODD.problem, tile, x, w, dy), lambda: tma_dgrad(ODD.problem, tile, dy, w, x)):
        with pytest.raises(
            ValueError, match=r"tile=1x8x8 pixels .* cannot step with stride 2x2 over 24 channels of 7x9 pixels"
        ):
            call()


# ----------------------------------------------------------------------------------------------------------------------
# The choice of the family


SERVED = Case("two boxes", (2, 64, 8, 8), (64, 3, 3), padding=PADDED)


def run_all(case, x, w, dy):
    """(y, dx, dw) by the tiles that conv.py chooses."""
    geometry = conv.Geometry(case.stride, case.padding, case.dilation, case.groups)
    y = conv.conv_fprop(x, w, geometry)
    dx = conv.conv_dgrad(dy, w, x.shape, geometry, fmt=torch.channels_last)
    return y, dx, conv.conv_wgrad(x, dy, w.shape, geometry)


def test_tensor_maps_serve_channels_last(launches, device):
    x, w, dy = operands(SERVED, device)
    ours = run_all(SERVED, x, w, dy)
    for mine, exact in zip(ours, reference(SERVED, x, w, dy), strict=True):
        assert torch.equal(mine, exact.half())
    assert [event.kernel for event in launches] == ["tma_fprop_kernel", "tma_dgrad_kernel", "tma_wgrad_kernel"]
    assert str(launches[0].tile) == "4x4x4 pixels k64 c64 w4 s4"


def test_statistics_and_residuals_come_by_tensor_maps(launches, device):
    x, w, dy = operands(SERVED, device)
    geometry = conv.Geometry((1, 1), PADDED, (1, 1), 1)
    y, mean, var = conv.conv_stats(x, w, geometry)
    exact = reference(SERVED, x, w, dy)[0]
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5)
    assert torch.equal(conv.conv_fprop(x, w, geometry, Epilogue(residual=dy)), y + dy)
    assert torch.equal(conv.conv_fprop(x, w, geometry, Epilogue(residual=dy.contiguous())), y + dy)
    assert [event.kernel for event in launches] == [
        "tma_fprop_kernel",
        "combine_kernel",
        "tma_fprop_kernel",
        "conv_fprop_kernel",
    ]


def unaligned(t):
    return (
        torch.cat([t.new_zeros(1), t.permute(0, 2, 3, 1).flatten()])[1:]
        .view(t.permute(0, 2, 3, 1).shape)
        .permute(0, 3, 1, 2)
    )


NOT_SERVED = {
    "x is NCHW": (SERVED, lambda x, w, dy: (x.contiguous(), w, dy)),
    "x at an odd address": (SERVED, lambda x, w, dy: (unaligned(x), w, dy)),
    "x with gaps of 2 bytes": (
        SERVED,
        lambda x, w, dy: (embed(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2), w, dy),
    ),
    "images one and the same": (SERVED, lambda x, w, dy: (x[:1].expand_as(x), w, dy[:1].expand_as(dy))),
    "float32": (SERVED, lambda *tensors: [t.float() for t in tensors]),
    "12 channels": (replace(SERVED, x=(2, 12, 8, 8)), None),
    "12 filters": (replace(SERVED, filters=(12, 3, 3)), None),
    "groups": (replace(SERVED, groups=2), None),
    "boxes mostly empty": (replace(SERVED, x=(2, 64, 3, 3)), None),
    "an odd image whose stride no box can step with": (replace(SERVED, x=(2, 64, 15, 15), stride=(2, 2)), None),
    "no image": (replace(SERVED, x=(0, 64, 8, 8)), None),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_pointers_serve(name, launches, device):
    case, change = NOT_SERVED[name]
    tensors = operands(case, device)
    x, w, dy = change(*tensors) if change else tensors
    ours = run_all(case, x, w, dy)
    for mine, exact in zip(ours, reference(case, x, w, dy), strict=True):
        assert torch.equal(mine.double(), exact)
    kernels = [event.kernel for event in launches]
    served = ["tma_dgrad_kernel"] if name.startswith("x ") else []  # which does not read x
    assert [kernel for kernel in kernels if kernel.startswith("tma_")] == served


@pytest.mark.parametrize(
    ("arch", "served"), [(80, False), (89, False), (90, True), (100, True), (103, True), (120, False)]
)
def test_architectures(arch, served, launches, device, monkeypatch):
    monkeypatch.setattr(devices, "gpu", lambda device: devices.Gpu("", arch))
    x, w, _ = operands(SERVED, device)
    geometry = conv.Geometry((1, 1), PADDED, (1, 1), 1)
    conv.conv_fprop(x, w, geometry)
    assert launches[0].kernel == ("tma_fprop_kernel" if served else "conv_fprop_kernel")
    if not served:
        with pytest.raises(
            ValueError, match=rf"tile=1x8x8 .* tensor maps, which cannot serve this call: sm_{arch} has"
        ):
            conv.conv_fprop(x, w, geometry, tile=BoxTile(1, 8, 8, 64, 64))
