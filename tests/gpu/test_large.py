"""More than 2**31 elements in one tensor: offsets are 64 bits wide, by pointers and by tensor maps.

Inputs are small integers that follow from their place in the tensor, so that any part of the result can be computed by
itself: parts at both ends and around the element 2**31 are, by PyTorch in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

import cnnfast.functional as F
from cnnfast_kernels import conv, devices
from cnnfast_kernels.conv import Geometry
from cnnfast_kernels.problem import MAX_PIXELS, ConvProblem
from cnnfast_kernels.tiling import TileConfig
from cnnfast_kernels.tma.views import why_not_on
from tests.support.gpu_ring import needs_memory

LAST = torch.channels_last
BOUNDARY = 2**31
C, SIZE = 64, 128
IMAGE = C * SIZE * SIZE  # elements, 2**20 of them
GEOMETRY = Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
POINTERS = TileConfig(128, 64, 32, 4, 3)


def numbered(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[N, C, H, W], channels_last: from -1 to 1 by a rule that no multiple of a power of two repeats."""
    N, C, H, W = shape
    t = torch.empty(N, H, W, C, dtype=dtype, device=device)
    row = torch.arange(H * W * C, device=device)
    # an image at a time: int64 numbers of all of them would take four times the memory of the tensor
    for n in range(N):
        t[n] = ((row + n * row.numel()) % 1009 % 3 - 1).to(dtype).view(H, W, C)
    return t.permute(0, 3, 1, 2)


def places(N: int, boundary: int = BOUNDARY // IMAGE) -> list[int]:
    """Images at both ends, and on both sides of the element 2**31."""
    return sorted({n for n in (0, boundary - 1, boundary, N - 1) if 0 <= n < N})


def weights(device: torch.device, R: int = 3) -> Tensor:
    """Of which every sum over a window of `numbered` is exact in bfloat16: 24 of the channels count, 216 products of
    ones.
    """
    w = torch.zeros(C, C, R, R, device=device)
    k = torch.arange(C, device=device)
    for i in range(24):
        w[k, (5 * k + 7 * i) % C] = (((k + i) % 3) - 1).float()[:, None, None]
    return w.to(torch.bfloat16).contiguous(memory_format=LAST)


def assert_images(y: Tensor, x: Tensor, function, N: int) -> None:
    for n in places(N):
        right = function(x[n : n + 1].double().contiguous())
        torch.testing.assert_close(
            y[n : n + 1].double(), right, rtol=0, atol=0, msg=lambda text, n=n: f"image {n}: {text}"
        )


def run_fprop(device: torch.device, N: int, tile) -> None:
    x, w = numbered((N, C, SIZE, SIZE), device), weights(device)
    y = conv.conv_fprop(x, w, GEOMETRY, tile=tile)
    assert_images(y, x, lambda image: theirs.conv2d(image, w.double().contiguous(), padding=1), N)


def run_dgrad(device: torch.device, N: int, tile) -> None:
    dy, w = numbered((N, C, SIZE, SIZE), device), weights(device)
    dx = conv.conv_dgrad(dy, w, dy.shape, GEOMETRY, fmt=LAST, tile=tile)
    assert_images(dx, dy, lambda image: theirs.conv_transpose2d(image, w.double().contiguous(), padding=1), N)


def run_wgrad(device: torch.device, N: int, tile) -> None:
    """Only the images at both ends and at the boundary have a gradient, so that the sum is small, and exact in
    float32.
    """
    x = numbered((N, C, SIZE, SIZE), device)
    dy = torch.zeros_like(x)
    right = torch.zeros(C, C, 3, 3, dtype=torch.float64, device=device)
    for n in places(N):
        dy[n, :, ::16, ::16] = x[n, :, 1::16, 3::16]  # 64 of the pixels
        image, gradient = x[n : n + 1].double().contiguous(), dy[n : n + 1].double().contiguous()
        right += torch.nn.grad.conv2d_weight(image, right.shape, gradient, padding=1)
    dw = conv.conv_wgrad(x, dy, tuple(right.shape), GEOMETRY, fmt=LAST, tile=tile)
    assert right.abs().max() <= 256, "the test asks for numbers that bfloat16 cannot hold"
    torch.testing.assert_close(dw.double(), right, rtol=0, atol=0)


def run_pool(device: torch.device, N: int, function, right) -> None:
    x = numbered((N, C, SIZE, SIZE), device)
    y = function(x)
    assert_images(y, x, right, N)


RUNS = {"fprop": run_fprop, "dgrad": run_dgrad, "wgrad": run_wgrad}
MANY = BOUNDARY // IMAGE + 3  # images: a bit more than 2**31 elements, 4 GiB in bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["pointers", "tensor maps"])
@pytest.mark.parametrize("operation", RUNS)
def test_convolutions(operation, family, roomy, launches):
    needs_memory(roomy, 12)
    if family == "tensor maps" and why_not_on(devices.architecture(roomy)):
        pytest.skip("GPU ring: this GPU has no tensor maps to feed wgmma or tcgen05 with")
    tile = POINTERS if family == "pointers" else None  # the default, where there are tensor maps
    RUNS[operation](roomy, MANY, tile)
    prefix = "conv" if family == "pointers" else "tma"
    assert f"{prefix}_{operation}_kernel" in {event.kernel for event in launches}


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
def test_pools(roomy):
    needs_memory(roomy, 12)
    run_pool(roomy, MANY, lambda x: F.max_pool2d(x, 3, 1, 1), lambda image: theirs.max_pool2d(image, 3, 1, 1))


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
def test_batch_norm_in_eval(roomy):
    """One pass over all elements: y = (x - 1) * 2 + 3."""
    needs_memory(roomy, 12)
    ones = torch.ones(C, device=roomy)
    x = numbered((MANY, C, SIZE, SIZE), roomy)
    y = F.batch_norm(x, ones, ones, 2 * ones, 3 * ones, eps=0.0)
    assert_images(y, x, lambda image: (image - 1) * 2 + 3, MANY)


@pytest.mark.gpu
@pytest.mark.usefixtures("by_kernels")
def test_moments(roomy):
    """Of channels that hold one number each, which a wrong offset would mix."""
    needs_memory(roomy, 12)
    x = torch.empty(MANY, SIZE, SIZE, C, dtype=torch.bfloat16, device=roomy)
    x[...] = torch.arange(C, device=roomy)
    mean, var = torch.zeros(C, device=roomy), torch.ones(C, device=roomy)
    F.batch_norm(x.permute(0, 3, 1, 2), mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, torch.arange(C, device=roomy).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, torch.zeros_like(var), rtol=0, atol=1e-6)


@pytest.mark.parametrize("operation", RUNS)
def test_the_judge_on_few_images(operation, device, monkeypatch):
    """The same code on images of 64 pixels: numbers are exact, and every image is looked at."""
    monkeypatch.setitem(globals(), "SIZE", 8)
    monkeypatch.setitem(globals(), "places", lambda N: [*range(N)])
    RUNS[operation](device, 2, TileConfig(64, 64, 32, 4, 2))


def test_numbers_differ_across_the_boundary():
    """An offset that lost its upper bits would read other numbers."""
    row = [(i % 1009) % 3 for i in range(2000)]
    for lost in (2**31, 2**32):
        assert [((i + lost) % 1009) % 3 for i in range(2000)] != row


@pytest.mark.parametrize(
    ("x", "padding"),
    [((1, 1, 2**16, 2**15), 0), ((2**21, 1, 2**5, 2**5), 0), ((1, 1, 2**15 - 1, 2**15 - 1), 2**14)],
    ids=["one image", "many images", "outputs"],
)
def test_more_pixels_than_can_be_counted_are_refused(x, padding):
    """Pixels, of which there may be fewer than 2**31, are counted in 32 bits, whatever the number of channels."""
    with pytest.raises(RuntimeError, match=f"must not exceed {MAX_PIXELS} pixels"):
        ConvProblem.of(x, (1, 1, 1, 1), (1, 1), (padding,) * 4, (1, 1), 1)
