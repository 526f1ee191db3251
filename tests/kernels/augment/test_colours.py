"""Each change of colours beside float64, written independently, and the exact cases among them."""

from __future__ import annotations

import colorsys

import pytest
import torch
from torch import Tensor

from cnnfast_kernels.augment import ImageNumbers, ImageSource, augment_batch
from cnnfast_kernels.augment.means import MOST_PARTS, mean_parts
from cnnfast_kernels.augment.tiles import TILE
from tests.support.augmenting import exact, identity, images, maps, whole

H, W = 9, 35
NOTHING = [1.0, 1.0, 1.0, 0.0, 0.0]


def grey(x: Tensor) -> Tensor:
    return (x * torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(1, keepdim=True)


def coloured(x: Tensor, numbers: list[float]) -> Tensor:
    """Images of float64, by Python's own colour wheel."""
    brightness, contrast, saturation, turns, to_grey = numbers
    x = (x * brightness).clamp(0, 1)
    if x.shape[1] == 1:
        return (contrast * x + (1 - contrast) * x.mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    x = (contrast * x + (1 - contrast) * grey(x).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    x = (saturation * x + (1 - saturation) * grey(x)).clamp(0, 1)
    for pixel in x.permute(0, 2, 3, 1).reshape(-1, 3) if turns else []:
        hue, full, value = colorsys.rgb_to_hsv(*pixel.tolist())
        pixel[:] = torch.tensor(colorsys.hsv_to_rgb((hue + turns) % 1, full, value), dtype=torch.float64)
    return grey(x).expand_as(x) if to_grey else x


def change(numbers: list[float], x: Tensor, contrast: bool = True, **how) -> Tensor:
    colours = torch.tensor([numbers] * len(x), device=x.device)
    how = {"C": x.shape[1]} | how
    return augment_batch(
        ImageSource(x), ImageNumbers(identity(len(x), x.device), colours), whole(*x.shape[2:], **how), contrast
    )


CHANGES = {
    "darker": [0.3, 1, 1, 0, 0],
    "brighter than white": [2.7, 1, 1, 0, 0],
    "black": [0, 1, 1, 0, 0],
    "less contrast": [1, 0.4, 1, 0, 0],
    "more contrast": [1, 3, 1, 0, 0],
    "less colour": [1, 1, 0.2, 0, 0],
    "more colour": [1, 1, 2.5, 0, 0],
    "a third of a turn": [1, 1, 1, 1 / 3, 0],
    "half a turn back": [1, 1, 1, -0.5, 0],
    "a bit of a turn": [1, 1, 1, 0.07, 0],
    "grey": [1, 1, 1, 0, 1],
    "all": [1.3, 0.7, 1.4, -0.2, 0],
    "all, and grey": [0.8, 1.6, 0.5, 0.45, 1],
}


@pytest.mark.parametrize("name", CHANGES)
def test_colours(name, device):
    x = images(1, H, W, torch.float32, device)
    x[0, :, 0, :8] = torch.tensor(  # grey, black, white, pure and mixed: where two channels, or all, are the same
        [[0.5, 0, 1, 1, 0, 0, 1, 0.25], [0.5, 0, 1, 0, 1, 0, 1, 0.5], [0.5, 0, 1, 0, 0, 1, 0, 0.5]], device=device
    )
    right = coloured(exact(x).clone(), CHANGES[name])
    torch.testing.assert_close(change(CHANGES[name], x).cpu().double(), right, rtol=0, atol=2e-6, check_stride=False)


@pytest.mark.parametrize("numbers", [[0.6, 1, 1, 0, 0], [1.2, 0.3, 2, 0.3, 1]])
def test_an_image_of_one_channel_has_brightness_and_contrast_alone(numbers, device):
    x = images(2, H, W, torch.uint8, device, C=1)
    right = coloured(exact(x), numbers)
    torch.testing.assert_close(change(numbers, x).cpu().double(), right, rtol=0, atol=1e-6, check_stride=False)


@pytest.mark.parametrize("contrast", [True, False])
def test_factors_of_one_change_no_bit(contrast, device, launches):
    x = images(1, H, W, torch.uint8, device)
    assert torch.equal(change(NOTHING, x, contrast).cpu(), exact(x).float())
    assert [event.kernel for event in launches] == ["grey_mean_kernel"] * contrast + ["augment_kernel"]


def test_each_image_has_its_own_numbers(device):
    x = images(4, 8, 8, torch.float32, device)
    rows = [NOTHING, CHANGES["more contrast"], CHANGES["grey"], CHANGES["all"]]
    y = augment_batch(ImageSource(x), ImageNumbers(identity(4, device), torch.tensor(rows, device=device)), whole(8, 8))
    for n, row in enumerate(rows):
        right = coloured(exact(x[n : n + 1]).clone(), row)
        torch.testing.assert_close(y[n : n + 1].cpu().double(), right, rtol=0, atol=2e-6, check_stride=False)


def test_powers_of_two_are_exact(device):
    """Of images whose values are multiples of 1/64: without contrast, what is left is the mean, to the bit."""
    x = (torch.randint(0, 65, (2, 1, 32, 64), generator=torch.Generator().manual_seed(0)) / 64).to(device)
    y = change([0.5, 0, 1, 0, 0], x)
    assert torch.equal(y, (x * 0.5).mean((1, 2, 3), keepdim=True).expand_as(x))


def test_the_mean_of_many_parts(device):
    """Of the image as it is warped: where the map leaves it, of the fill."""
    P, Q = 15, 131  # 10 tiles: two parts, the second of them shorter
    assert mean_parts(TILE.count(P, Q)) == (2, 8)
    x = images(2, 12, 50, torch.uint8, device, C=1)
    m = maps([[0.3, 0.1, -2], [0.05, 0.5, 1]], 2, device)
    plain = augment_batch(ImageSource(x), ImageNumbers(m), whole(P, Q, C=1, fill=0.7))
    colours = torch.tensor([[1, 0, 1, 0, 0], [0.9, 0.5, 1, 0, 0]], device=device)
    y = augment_batch(ImageSource(x), ImageNumbers(m, colours), whole(P, Q, C=1, fill=0.7)).cpu().double()
    plain = plain.cpu().double()
    torch.testing.assert_close(y[0], plain[0].mean().expand_as(y[0]), rtol=0, atol=1e-6)
    right = 0.5 * 0.9 * plain[1] + 0.5 * (0.9 * plain[1]).mean()
    torch.testing.assert_close(y[1], right, rtol=0, atol=1e-6)


def test_parts_cover_the_tiles():
    for tiles in (*range(1, 2000), 10**6):
        parts, span = mean_parts(tiles)
        assert 1 <= parts <= MOST_PARTS == 64, "so many grey_mean adds up"
        assert (parts - 1) * span < tiles <= parts * span


def test_numbers_beyond_reason_end_within_the_range(device):
    x = images(1, 8, 8, torch.float32, device)
    for numbers in ([1e30, 1, 1, 0, 0], [1, -50, 1, 0, 0], [1, 1, 1e30, 0, 0], [-2, 3, 9, 0, 0]):
        y = change(numbers, x)
        assert ((y >= 0) & (y <= 1)).all(), numbers
