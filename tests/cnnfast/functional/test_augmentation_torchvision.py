"""F.augment against torchvision.transforms.v2.functional, step by step and in chains, by our kernels and by plain
PyTorch.

What is right is what torchvision computes in float64. Ours may miss it by twice what torchvision's own float32 does,
and by a floor that tests/support/against_torchvision.py derives; divided by the least of `std` where results are
normalised. What torchvision only copies is compared to the last bit. torchvision interpolates on tensors with
antialias=False, and clamps after each operation on colours, as ours do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import cnnfast.functional as ours
from cnnfast.dispatch import backend
from tests.support.against_torchvision import (
    FLOOR,
    SAMPLED,
    H,
    W,
    adjusted_hue,
    assert_as_good,
    photographs,
    recoloured,
)
from tests.support.packages import package

NO_COLOURS = (1.0, 1.0, 1.0, 0.0, 0.0)


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def path(request) -> Iterator[str]:
    """Who computes."""
    with backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def bilinear() -> dict[str, Any]:
    """As an option of torchvision's functions."""
    return {"interpolation": package("torchvision.transforms").InterpolationMode.BILINEAR}


@pytest.fixture(scope="module")
def tv() -> ModuleType:
    return package("torchvision.transforms.v2.functional")


def augment(
    images: Tensor,
    device: torch.device,
    maps: Sequence[Any] | None = None,
    colours: Sequence[float] | None = None,
    boxes: Any = None,
    partners: Any = None,
    size: tuple[int, int] = (H, W),
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    **options: Any,
) -> Tensor:
    """F.augment, where all images have the same map and colours."""
    N = len(images)
    numbers = [
        None if maps is None else torch.tensor([maps] * N, dtype=torch.float32),
        None if colours is None else torch.tensor([colours] * N),
        None if boxes is None else torch.tensor(boxes),
        None if partners is None else torch.tensor(partners),
    ]
    y = ours.augment(
        images.to(device), *numbers, size=size, mean=list(mean), std=list(std), dtype=torch.float32, **options
    )
    return y.cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Colours

COLOURS = {
    "adjust_brightness": (0, [0.0, 0.4, 1.0, 1.7]),
    "adjust_contrast": (1, [0.0, 0.3, 1.0, 1.9]),
    "adjust_saturation": (2, [0.0, 0.5, 1.0, 2.5]),
    "adjust_hue": (3, [-0.5, -0.2, 0.0, 0.01, 1 / 6, 0.3, 0.5]),
}


@pytest.mark.parametrize("C", [3, 1])
@pytest.mark.parametrize("name", COLOURS)
def test_adjust(name, C, tv, device):
    where, factors = COLOURS[name]
    adjust = adjusted_hue if name == "adjust_hue" and C == 3 else getattr(tv, name)
    images = photographs(C=C)
    images[:, :, :4, :8] = (images[:, :, :4, :8] * 2).round() / 2  # greys, black and white, and pure colours too
    for factor in factors:
        colours = [factor if i == where else usual for i, usual in enumerate(NO_COLOURS)]
        mine = augment(images, device, colours=colours)
        factor = float(torch.tensor(factor))  # as float32 holds it
        assert_as_good(mine, images, lambda x, f=factor: adjust(x, f))
        if factor == NO_COLOURS[where]:
            assert torch.equal(mine, images)


def test_rgb_to_grayscale(tv, device):
    images = photographs()
    mine = augment(images, device, colours=[1, 1, 1, 0, 1.0])
    assert_as_good(mine, images, lambda x: tv.rgb_to_grayscale(x, num_output_channels=3))


def test_colours_in_their_order(tv, device):
    """The mean of contrast is that of the brightened image, and each operation starts where the one before ended."""
    images = photographs()
    for factors in ([1.6, 0.5, 1.8, 0.2, 0.0], [0.7, 1.8, 0.4, -0.35, 1.0], [1.9, 1.9, 2.5, 0.45, 0.0]):
        numbers = torch.tensor(factors).tolist()
        mine = augment(images, device, colours=factors)
        assert_as_good(mine, images, lambda x, numbers=numbers: recoloured(x, numbers))


# ----------------------------------------------------------------------------------------------------------------------
# Maps


def centred(angle: float = 0, translate: Sequence[float] = (0, 0), scale: float = 1, shear: Sequence[float] = (0, 0)):
    """The map of torchvision's affine, from its documentation: the image is sheared, scaled, turned clockwise about its
    centre and moved; a map goes the other way, from the result to the image.
    """
    a, sx, sy = (math.radians(v) for v in (angle, *shear))
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]).double()
    along_x = torch.tensor([[1, -math.tan(sx)], [0, 1]]).double()
    along_y = torch.tensor([[1, 0], [-math.tan(sy), 1]]).double()
    forward = turn @ along_y @ along_x * scale
    back = torch.linalg.inv(forward)
    centre = torch.tensor([W / 2, H / 2]).double()
    moved = centre - back @ (centre + torch.tensor(translate).double())
    return torch.cat([back, moved[:, None]], 1).tolist()


AFFINE = {
    "turned": {"angle": 30},
    "turned far": {"angle": -155},
    "moved": {"translate": [3, -5]},
    "grown": {"scale": 1.7},
    "shrunk": {"scale": 0.45},
    "sheared": {"shear": [20, 0]},
    "sheared along y": {"shear": [0, -15]},
    "sheared along both": {"shear": [12, 33]},
    "all": {"angle": 75, "translate": [4, 2], "scale": 0.8, "shear": [-10, 25]},
}
USUAL = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}


@pytest.mark.parametrize("name", AFFINE)
def test_affine(name, tv, bilinear, device):
    images, options = photographs(), USUAL | AFFINE[name] | bilinear
    mine = augment(images, device, centred(**AFFINE[name]))
    assert_as_good(mine, images, lambda x: tv.affine(x, **options), floor=SAMPLED)


@pytest.mark.parametrize("angle", [17.0, 90.0, -120.0])
def test_rotate(angle, tv, bilinear, device):
    images = photographs()
    mine = augment(images, device, centred(-angle))
    assert_as_good(mine, images, lambda x: tv.rotate(x, angle, **bilinear), floor=SAMPLED)


def test_affine_with_fill(tv, bilinear, device):
    """Where a pixel lies in part beyond the border torchvision weighs the image twice with the part inside: what it
    interpolates between the image and zeros it blends with `fill` by that part again. Ours interpolates between the
    image and `fill`. Elsewhere both are the same.
    """
    images, fill = photographs(), [0.9, 0.2, 0.6]
    options = USUAL | AFFINE["all"] | bilinear
    mine = augment(images, device, centred(**AFFINE["all"]), fill=fill)
    part = tv.affine(torch.ones(1, 1, H, W).double(), **options)
    inside, outside = part > 1 - 1e-9, part < 1e-9
    assert_as_good(mine, images, lambda x: tv.affine(x, fill=fill, **options), inside, SAMPLED)
    filled = torch.tensor(fill)[:, None, None]
    torch.testing.assert_close(torch.where(outside, mine, filled), filled.expand_as(mine), rtol=0, atol=FLOOR)

    def interpolated(x: Tensor) -> Tensor:
        return tv.affine(x, **options) + ((1 - part) * filled).to(x)

    assert_as_good(mine, images, interpolated, ~inside & ~outside, SAMPLED)


def test_flips_are_exact(tv, device):
    images = photographs()
    assert torch.equal(augment(images, device, [[-1, 0, W], [0, 1, 0]]), tv.horizontal_flip(images))
    assert torch.equal(augment(images, device, [[1, 0, 0], [0, -1, H]]), tv.vertical_flip(images))


@pytest.mark.parametrize("size", [(12, 17), (1, 1), (15, 30), (9, 31)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("border", ["constant", "reflection"])
def test_resize_to_fewer_pixels(size, border, tv, device):
    """Maps of None, too, are those of resizing."""
    images = photographs()
    one = [[W / size[1], 0, 0], [0, H / size[0], 0]]
    for maps in (one, None):
        mine = augment(images, device, maps, size=size, border=border)
        assert_as_good(mine, images, lambda x: tv.resize(x, list(size), antialias=False), floor=SAMPLED)


@pytest.mark.parametrize("size", [(32, 62), (21, 32), (47, 31)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_resize_to_more_pixels(size, tv, device):
    """torchvision repeats the pixels at the edges; so does a reflection. A constant lies around the image otherwise,
    and reaches half a pixel of it into the result.
    """
    images = photographs()
    chain = lambda x: tv.resize(x, list(size), antialias=False)  # noqa: E731
    assert_as_good(augment(images, device, size=size, border="reflection"), images, chain, floor=SAMPLED)
    x, y = ((torch.arange(n) + 0.5) * extent / n for n, extent in ((size[1], W), (size[0], H)))
    middle = ((y >= 0.5) & (y <= H - 0.5))[:, None] & (x >= 0.5) & (x <= W - 0.5)
    assert_as_good(augment(images, device, size=size), images, chain, middle, SAMPLED)


@pytest.mark.parametrize("size", [(8, 12), (16, 31)], ids=["fewer", "more"])
def test_resized_crop(size, tv, device):
    """torchvision cuts first, so that a pixel near the crop's edge sees the edge repeated; ours goes on to the image's
    pixels beside the crop. They are the same from half a pixel within the crop on: everywhere, if pixels become fewer.
    """
    images = photographs()
    top, left, height, width = 3, 7, 11, 19
    (P, Q) = size
    mine = augment(images, device, [[width / Q, 0, left], [0, height / P, top]], size=size)
    x, y = ((torch.arange(n) + 0.5) * extent / n for n, extent in ((Q, width), (P, height)))
    middle = ((y >= 0.5) & (y <= height - 0.5))[:, None] & (x >= 0.5) & (x <= width - 0.5)
    assert bool(middle.all()) == (P < height)
    chain = lambda x: tv.resized_crop(x, top, left, height, width, list(size), antialias=False)  # noqa: E731
    assert_as_good(mine, images, chain, middle, SAMPLED)


def test_crops_are_exact(tv, device):
    images = photographs()
    for top, left, height, width in ((3, 5, 12, 20), (-2, -3, 16, 20), (10, 20, 16, 30)):  # beyond the image, too
        mine = augment(images, device, [[1, 0, left], [0, 1, top]], size=(height, width))
        assert torch.equal(mine, tv.crop(images, top, left, height, width))
    mine = augment(images, device, [[1, 0, 6], [0, 1, 2]], size=(12, 19))
    assert torch.equal(mine, tv.center_crop(images, [12, 19]))


@pytest.mark.parametrize(("border", "mode"), [("constant", "constant"), ("reflection", "symmetric")])
def test_crops_of_a_padded_image_are_exact(border, mode, tv, device):
    """RandomCrop with padding. torchvision's own "reflect" does not repeat the pixel at the edge; ours does, as its
    "symmetric" and as grid_sample.
    """
    images = photographs()
    for top, left in ((0, 0), (7, 3), (8, 8)):
        padded = tv.pad(images, [4], fill=0.5, padding_mode=mode)
        mine = augment(images, device, [[1, 0, left - 4], [0, 1, top - 4]], border=border, fill=0.5)
        assert torch.equal(mine, tv.crop(padded, top, left, H, W))


def test_an_image_of_bytes(tv, device):
    """Ours is v / 255 to the last bit, as of torchvision's ToTensor; its to_dtype multiplies by 1 / 255."""
    images = (photographs() * 255).round().to(torch.uint8)
    for mine in (augment(images, device), augment(images.permute(0, 2, 3, 1), device)):
        assert torch.equal(mine, images / 255)
        torch.testing.assert_close(mine, tv.to_dtype(images, torch.float32, scale=True), rtol=2.0**-23, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Boxes, partners, normalisation

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_erase_is_exact(tv, device):
    images = photographs()
    box = [5.0, 3, 5 + 9, 3 + 7]
    mine = augment(images, device, boxes=[[[*box, 0.25, 0.5, 0.75]], [[0.0] * 7]])
    first = tv.erase(images[:1], 3, 5, 7, 9, torch.tensor([0.25, 0.5, 0.75])[:, None, None])
    assert torch.equal(mine, torch.cat([first, images[1:]]))


def test_normalize(tv, device):
    images = photographs()
    mine = augment(images, device, mean=MEAN, std=STD)
    as_float32 = [torch.tensor(numbers).tolist() for numbers in (MEAN, STD)]
    assert_as_good(mine, images, lambda x: tv.normalize(x, *as_float32))


def mixing(kind: str, images: Tensor, **numbers: Any) -> Tensor:
    """torchvision's MixUp or CutMix, with numbers that are given: the partner is the image before."""
    transform = getattr(package("torchvision.transforms.v2"), kind)(num_classes=2)
    return transform.transform(images, {"labels": None, "batch_size": len(images), **numbers})


def test_mixup(device):
    images = photographs(N=3)
    weight = float(torch.tensor(0.3))
    mine = augment(images, device, partners=[[float((n - 1) % 3), weight, 0, 0, 0, 0] for n in range(3)])
    assert_as_good(mine, images, lambda x: mixing("MixUp", x, lam=weight))


def test_cutmix_is_exact(device):
    images = photographs(N=3)
    box = (4, 3, 20, 11)
    mine = augment(images, device, partners=[[float((n - 1) % 3), 1.0, *map(float, box)] for n in range(3)])
    assert torch.equal(mine, mixing("CutMix", images, box=box, lam_adjusted=0.5))


# ----------------------------------------------------------------------------------------------------------------------
# Chains


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_a_chain(kind, tv, bilinear, device):
    """Everything in its order: the map, five operations on colours, a box, normalisation, a partner. Partners are mixed
    before normalisation here and after it there, which is the same but for rounding.
    """
    images = photographs(N=3)
    colours = [1.3, 0.6, 1.7, 0.15, 0.0]
    weight, box = float(torch.tensor(0.7)), (2, 3, 22, 15)
    as_float32 = [torch.tensor(numbers).tolist() for numbers in (MEAN, STD)]

    def chain(x: Tensor) -> Tensor:
        x = tv.affine(x, **(USUAL | {"angle": 20, "scale": 1.2, "translate": [2, 1]} | bilinear))
        x = recoloured(x, torch.tensor(colours).tolist())
        x = tv.erase(x, 6, 9, 8, 10, torch.tensor([0.25, 0.5, 0.75]).to(x)[:, None, None])
        x = tv.normalize(x, *as_float32)
        return mixing(kind, x, lam=weight) if kind == "MixUp" else mixing(kind, x, box=box, lam_adjusted=0.5)

    partners = [
        [float((n - 1) % 3), *([weight, 0, 0, 0, 0] if kind == "MixUp" else [1.0, *map(float, box)])] for n in range(3)
    ]
    mine = augment(
        images, device, centred(20, [2, 1], 1.2), colours, [[[9.0, 6, 19, 14, 0.25, 0.5, 0.75]]] * 3, partners,
        mean=MEAN, std=STD,
    )  # fmt: skip
    assert_as_good(mine, images, chain, floor=SAMPLED / min(STD))


def test_a_chain_of_a_classifier(tv, device):
    """RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, Normalize: a crop to fewer pixels."""
    images = photographs()
    size, (top, left, height, width) = (10, 14), (3, 6, 12, 21)
    colours = [0.8, 1.4, 0.7, -0.1, 1.0]
    as_float32 = [torch.tensor(numbers).tolist() for numbers in (MEAN, STD)]

    def chain(x: Tensor) -> Tensor:
        x = tv.horizontal_flip(tv.resized_crop(x, top, left, height, width, list(size), antialias=False))
        return tv.normalize(recoloured(x, torch.tensor(colours).tolist()), *as_float32)

    maps = [[-width / size[1], 0, left + width], [0, height / size[0], top]]
    assert_as_good(
        augment(images, device, maps, colours, size=size, mean=MEAN, std=STD), images, chain, floor=SAMPLED / min(STD)
    )
