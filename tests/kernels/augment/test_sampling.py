"""Images seen through maps: exact where positions are centres of pixels, beside float64 elsewhere, and never a byte
from outside an image.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels.augment import ImageNumbers, ImageSource, augment_batch
from cnnfast_kernels.augment.sources import MAX_ELEMENTS, MAX_EXTENT
from tests.support.augmenting import IMAGE_DTYPES, LAYOUTS, exact, identity, images, lay_out, maps, ragged, whole

H, W = 11, 37  # two tiles by two, the last of them ragged
INF, NAN = float("inf"), float("nan")

# name -> (map, the same by moving pixels)
MOVES = {
    "nothing": ([[1, 0, 0], [0, 1, 0]], lambda x: x),
    "flip": ([[-1, 0, W], [0, 1, 0]], lambda x: x.flip(3)),
    "vertical flip": ([[1, 0, 0], [0, -1, H]], lambda x: x.flip(2)),
    "half a turn": ([[-1, 0, W], [0, -1, H]], lambda x: x.flip(2, 3)),
    "a quarter": ([[0, 1, 0], [-1, 0, H]], lambda x: x.rot90(-1, (2, 3))),
    "three quarters": ([[0, -1, W], [1, 0, 0]], lambda x: x.rot90(1, (2, 3))),
    "a shift": ([[1, 0, -3], [0, 1, 2]], lambda x: F.pad(x, (3, -3, -2, 2))),
    "a crop": ([[1, 0, 5], [0, 1, 2]], lambda x: x[:, :, 2:9, 5:17]),
    "every third pixel": ([[3, 0, 0.5 - 1.5], [0, 3, 0.5 - 1.5]], lambda x: x[:, :, ::3, ::3]),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("dtype", IMAGE_DTYPES, ids=str)
def test_moved_pixels_are_the_same_to_the_bit(name, dtype, device):
    rows, moved = MOVES[name]
    x = images(1, H, W, dtype, device)
    right = moved(exact(x)).float()
    y = augment_batch(ImageSource(x), ImageNumbers(maps(rows, 1, device)), whole(*right.shape[2:]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.cpu(), right)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("reflect", [False, True])
def test_every_byte_is_divided_as_pytorch_divides_it(C, reflect, device):
    x = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 8, 32).expand(1, C, 8, 32)
    y = augment_batch(ImageSource(x), ImageNumbers(identity(1, device)), whole(8, 32, C=C, reflect=reflect))
    assert torch.equal(y.cpu(), x.cpu().float() / 255)


@pytest.mark.parametrize(
    ("mean", "std"), [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225), (0.5, 0.5), (0.1307, 0.3081)]
)
def test_results_are_normalised_as_pytorch_divides(mean, std, device):
    x = images(1, H, W, torch.float32, device)
    y = augment_batch(ImageSource(x), ImageNumbers(identity(1, device)), whole(H, W, mean=mean, std=std))
    assert torch.equal(y.cpu(), (x.cpu() - mean) / torch.tensor(std))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("C", [1, 3])
def test_dtypes_of_results(dtype, C, device):
    x = images(1, H, W, torch.float32, device, C)
    y = augment_batch(ImageSource(x), ImageNumbers(identity(1, device)), whole(H, W, dtype, C, mean=0.5, std=0.25))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.cpu(), ((x.cpu() - 0.5) / 0.25).to(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Beside float64


def turned(degrees: float, scale: float, shift: tuple[float, float], height: int, width: int) -> list[list[float]]:
    """About the middle of a result of that size, to the middle of the image; shift in pixels of the image."""
    cosine, sine = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return [
        [cosine, -sine, W / 2 + shift[0] - cosine * x + sine * y],
        [sine, cosine, H / 2 + shift[1] - sine * x - cosine * y],
    ]


def reference(x: Tensor, m: Tensor, P: int, Q: int, fill: float = 0.0, reflect: bool = False) -> Tensor:
    """By grid_sample in the dtype of x, which is not of bytes."""
    height, width = x.shape[2:]
    q, p = torch.arange(Q, dtype=x.dtype) + 0.5, torch.arange(P, dtype=x.dtype) + 0.5
    result = torch.stack([q.expand(P, Q), p[:, None].expand(P, Q), torch.ones(P, Q, dtype=x.dtype)], -1)
    positions = torch.einsum("nij,pqj->npqi", m.cpu().to(x.dtype), result)
    grid = positions / torch.tensor([width, height], dtype=x.dtype) * 2 - 1
    mode = "reflection" if reflect else "zeros"
    return F.grid_sample(x - fill, grid, "bilinear", mode, align_corners=False) + fill


def assert_as_good(y: Tensor, x: Tensor, m: Tensor, fill: float, reflect: bool) -> None:
    """As near to float64 as twice what PyTorch's float32 is away, and two units in the last place of 1."""
    P, Q = y.shape[2:]
    right = reference(exact(x), m, P, Q, fill, reflect)
    theirs = (reference(exact(x).float(), m, P, Q, fill, reflect).double() - right).abs().max()
    assert (y.cpu().double() - right).abs().max() <= 2 * theirs + 2**-22


TURNS = {
    "turned": turned(30, 0.7, (0.3, -0.2), 12, 40),
    "smaller": turned(-100, 2.6, (3.25, 1.5), 12, 40),
    "larger": turned(5, 0.11, (-6.2, 2.9), 12, 40),
    "sheared": [[1.1, 0.6, -3.3], [-0.2, 0.8, 1.7]],
    "far away": turned(200, 9.0, (15.0, -20.0), 12, 40),
}


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize(("fill", "reflect"), [(0.0, False), (0.3, False), (0.0, True)], ids=["", "fill", "reflect"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_any_map(name, fill, reflect, dtype, device):
    x, m = images(1, H, W, dtype, device), maps(TURNS[name], 1, device)
    y = augment_batch(ImageSource(x), ImageNumbers(m), whole(12, 40, fill=fill, reflect=reflect))
    assert_as_good(y, x, m, fill, reflect)


@pytest.mark.parametrize("extents", [(1, 37), (11, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("reflect", [False, True])
def test_images_of_few_pixels(extents, reflect, device):
    """Reflected, they are folded dozens of times within a result."""
    x, m = images(1, *extents, torch.float32, device), maps([[1.7, -0.3, -9.1], [0.4, 2.3, -11.2]], 1, device)
    y = augment_batch(ImageSource(x), ImageNumbers(m), whole(12, 40, reflect=reflect))
    assert_as_good(y, x, m, 0.0, reflect)


def test_folds_are_exact_for_whole_pixels(device):
    """At the centres of pixels near and far, on both sides: those of the image and of its mirror image in turn."""
    x = images(1, 1, 7, torch.float32, device)
    for start in (-70, -21, 0, 980000):
        m = maps([[1, 0, start], [0, 1, 0]], 1, device)
        y = augment_batch(ImageSource(x), ImageNumbers(m), whole(1, 33, reflect=True))
        places = [(q + start) % 14 for q in range(33)]
        right = x[..., [place if place < 7 else 13 - place for place in places]]
        assert torch.equal(y, right), start


# ----------------------------------------------------------------------------------------------------------------------
# Where images lie


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", IMAGE_DTYPES, ids=str)
def test_layouts_make_no_difference(layout, dtype, device):
    x, m = images(2, H, W, dtype, device), maps(TURNS["turned"], 2, device)
    laid = lay_out(x, layout)
    y = augment_batch(ImageSource(laid), ImageNumbers(m), whole(12, 40, fill=0.2))
    assert torch.equal(y, augment_batch(ImageSource(laid.clone()), ImageNumbers(m), whole(12, 40, fill=0.2)))
    assert y.isfinite().all()


@pytest.mark.parametrize(("C", "reflect"), [(1, True), (3, False)])
def test_images_of_different_sizes(C, reflect, device):
    """Each as it is in a batch of its own, to the bit."""
    each = [images(1, *size, torch.uint8, device, C, seed)[0] for seed, size in enumerate([(11, 37), (1, 5), (40, 3)])]
    m = torch.stack([maps(TURNS["turned"], 1, device)[0], maps([[0.3, 0, 0], [0, 0.1, 0.2]], 1, device)[0],
                     maps([[0.2, 1, -4], [3, 0, -7]], 1, device)[0]])  # fmt: skip
    augmenting = whole(12, 40, C=C, fill=0.4, reflect=reflect)
    y = augment_batch(ImageSource(*ragged(each)), ImageNumbers(m), augmenting)
    for n, image in enumerate(each):
        alone = augment_batch(ImageSource(image[None]), ImageNumbers(m[n : n + 1].clone()), augmenting)
        assert torch.equal(y[n : n + 1], alone), n


@pytest.mark.parametrize("rows", [
    [[NAN, 0, 0], [0, 1, 0]], [[INF, 0, 0], [0, -INF, 0]], [[1, 0, 3e38], [0, 1, -3e38]], [[1, 0, 2.0**31], [0, 1, 0]],
    [[0, 0, -(2.0**32)], [0, 0, 2.0**33]], [[1e30, -1e30, NAN], [0, 0, INF]],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", ["cut from nchw", "cut from nhwc"])
def test_maps_to_nowhere_read_nothing(rows, layout, device):
    """Beyond the border is the fill; the image's memory, which is full of NaN around it, is not read."""
    x = lay_out(images(2, 9, 9, torch.float32, device), layout)
    y = augment_batch(ImageSource(x), ImageNumbers(maps(rows, 2, device)), whole(9, 9, fill=0.25))
    assert torch.equal(y, torch.full_like(y, 0.25))
    y = augment_batch(ImageSource(x), ImageNumbers(maps(rows, 2, device)), whole(9, 9, reflect=True))
    assert y.isfinite().all(), "reflected, it is some pixel of the image"


def test_the_border_mixes_with_the_fill_and_not_with_what_lies_beside_the_image(device):
    x = lay_out(torch.ones(1, 3, 4, 4, device=device), "cut from nhwc")
    y = augment_batch(ImageSource(x), ImageNumbers(maps([[1, 0, -0.5], [0, 1, 0]], 1, device)), whole(4, 5, fill=0.5))
    assert torch.equal(y[0, 0, 0].cpu(), torch.tensor([0.75, 1.0, 1.0, 1.0, 0.75]))


def test_a_neighbour_without_weight_is_not_read(device):
    """What is no number stays where it is: a pixel beside it comes out as it was."""
    x = images(1, H, W, torch.float32, device)
    x[0, :, 5, 20], x[0, 1, 0, 0], x[0, 2, H - 1, W - 1] = NAN, NAN, NAN
    y = augment_batch(ImageSource(x), ImageNumbers(identity(1, device)), whole(H, W))
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True, check_stride=False)


def test_offsets_beyond_31_bits(device):
    """The second image lies 2^31 elements behind the first: memory reserved, but never touched in between."""
    memory = torch.empty(2**31 + 2000, dtype=torch.uint8, device=device)
    x = memory.as_strided((2, 3, H, W), (2**31, 1, 3 * W, 3))
    x.copy_(images(2, H, W, torch.uint8, device))
    offsets = torch.tensor([0, 2**31], device=device)
    sizes = torch.tensor([[H, W]] * 2, dtype=torch.int32, device=device)
    for source in (ImageSource(x), ImageSource(memory, offsets, sizes)):
        y = augment_batch(source, ImageNumbers(identity(2, device)), whole(H, W))
        assert torch.equal(y.cpu(), exact(x).float())


class Large:
    """Of these shapes there is no memory to be had."""

    dtype, offsets, sizes = torch.uint8, None, None

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def stride(self) -> tuple[int, ...]:
        _, C, height, width = self.shape
        return C * height * width, height * width, width, 1


@pytest.mark.parametrize(
    ("shape", "size", "named"),
    [
        ((1, 3, MAX_EXTENT + 1, 4), (8, 8), f"no extent may be above {MAX_EXTENT}"),
        ((1, 3, 8, 8), (8, MAX_EXTENT + 1), f"no extent may be above {MAX_EXTENT}"),
        ((1, 3, 2**15, 2**15), (8, 8), f"may have {MAX_ELEMENTS}, not {3 * 2**30}"),
        ((1, 3, 8, 8), (2**15, 2**15), f"may have {MAX_ELEMENTS}, not {3 * 2**30}"),
        ((2**20, 3, 8, 8), (2**12, 2**9), "a launch of 8589934592 programs"),
    ],
)
def test_more_than_32_bits_count_is_refused(shape, size, named, device):
    source = ImageSource(Large(*shape))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=named):
        augment_batch(source, ImageNumbers(identity(1, device)), whole(*size))


def test_the_largest_extents_are_exact(device):
    """The last pixel of the widest image there may be, and what lies beyond it."""
    x = torch.zeros(1, 1, 1, MAX_EXTENT, dtype=torch.uint8, device=device)
    x[..., -2:] = torch.tensor([51, 102], dtype=torch.uint8, device=device)
    m = maps([[1, 0, MAX_EXTENT - 2], [0, 1, 0]], 1, device)
    y = augment_batch(ImageSource(x), ImageNumbers(m), whole(1, 4, C=1, fill=1.0))
    assert torch.equal(y.flatten().cpu(), torch.tensor([51 / 255, 102 / 255, 1.0, 1.0]))
    for edge in (INF, -INF, NAN):
        y = augment_batch(ImageSource(x), ImageNumbers(maps([[1, 0, edge], [0, 1, 0]], 1, device)),
                          whole(1, 4, C=1, fill=1.0))  # fmt: skip
        assert torch.equal(y, torch.ones_like(y)), edge
