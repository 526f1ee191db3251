"""cnn.Augment against loops of torchvision's functions that are given the numbers it drew, one image after another, by
our kernels and by plain PyTorch. Bounds are those of tests/support/against_torchvision.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import cnnfast.functional as F
import cnnfast.nn as cnn
from cnnfast.dispatch import backend
from tests.support.against_torchvision import SAMPLED, H, W, assert_as_good, photographs, recoloured
from tests.support.packages import package

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PLAIN = {"mean": 0.0, "std": 1.0}
FULL_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale_p": 0.3}
INDEX = [7, 100, 2**40, 3]


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def path(request) -> Iterator[str]:
    """Who computes."""
    with backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def tv() -> ModuleType:
    return package("torchvision.transforms.v2.functional")


def each(images: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """function([1, C, H, W], n) of every image n."""
    return torch.cat([function(image[None], n) for n, image in enumerate(images)])


def as_float32(*numbers: Sequence[float]) -> list[list[float]]:
    return [torch.tensor(each).tolist() for each in numbers]


def upright(one: Tensor, size: tuple[int, int]) -> tuple[tuple[int, int, int, int], bool, bool]:
    """What a map without rotation does: (top, left, height, width) of its crop, and whether it is mirrored in x and in
    y.
    """
    P, Q = size
    (a, b, x), (c, d, y) = one.tolist()
    assert b == c == 0
    width, height = abs(a) * Q, abs(d) * P
    corner = y - height * (d < 0), x - width * (a < 0)
    crop = [round(v) for v in (*corner, height, width)]
    assert max(abs(v - whole) for v, whole in zip((*corner, height, width), crop, strict=True)) < 1e-4
    return tuple(crop), a < 0, d < 0


def affine_numbers(one: Tensor) -> dict[str, Any]:
    """The arguments of torchvision's affine whose inverse is this map, if nothing is sheared along y."""
    centre = torch.tensor([W / 2, H / 2]).double()
    back, moved = one.double().split([2, 1], 1)
    forward = torch.linalg.inv(back)
    (a, b), (c, d) = forward.tolist()
    shift = forward @ (centre - moved[:, 0]) - centre
    scale = math.hypot(a, c)
    return {
        "angle": math.degrees(math.atan2(c, a)),
        "translate": shift.tolist(),
        "scale": scale,
        "shear": [math.degrees(math.atan(-(a * b + c * d) / scale**2)), 0.0],
    }


def test_random_resized_crops_and_colours(tv, device):
    """RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, Normalize, RandomErasing. Crops have more
    pixels than results: otherwise ours sees the pixels beside a crop, which torchvision has cut off.
    """
    size, values = (12, 20), [0.5, -1.0, 2.0]
    images = photographs(4, height=31, width=47)
    augment = cnn.Augment(
        size, crop_scale=(0.5, 1.0), **FULL_JITTER, erasing_p=0.7, erasing_value=values, mean=MEAN, std=STD, seed=0
    )
    draws = augment.draw((31, 47), INDEX, epoch=2)
    assert draws.boxes is not None
    assert draws.colours is not None
    seen = [upright(one, size) for one in draws.maps]
    assert {mirrored for _, mirrored, _ in seen} == {True, False}
    assert len({int(grey) for grey in draws.colours[:, 4]}) == 2
    assert len({bool(box[0, 2] > 0) for box in draws.boxes}) == 2
    mean, std = as_float32(MEAN, STD)
    value = torch.tensor(values)[:, None, None]

    def one(x: Tensor, n: int) -> Tensor:
        (top, left, height, width), mirrored, _ = seen[n]
        assert height >= size[0]
        assert width >= size[1]
        x = tv.resized_crop(x, top, left, height, width, list(size), antialias=False)
        x = recoloured(tv.horizontal_flip(x) if mirrored else x, draws.colours[n].tolist())
        left, top, right, bottom = (int(v) for v in draws.boxes[n, 0, :4])
        return tv.erase(tv.normalize(x, mean, std), top, left, bottom - top, right - left, value.to(x))

    mine = augment(images.to(device), index=INDEX, epoch=2).cpu()
    assert_as_good(mine, images, lambda x: each(x, one), floor=SAMPLED / min(STD))


def test_random_crops_are_exact(tv, device):
    """RandomCrop with padding, and both flips: whole pixels of the image and the fill."""
    images = photographs(4)
    options = {"crop_scale": None, "padding": 4, "fill": 0.5, "vertical_flip_p": 0.5}
    augment = cnn.Augment((H, W), **options, **PLAIN, seed=2)
    seen = [upright(one, (H, W)) for one in augment.draw((H, W), INDEX).maps]
    assert len({crop for crop, _, _ in seen}) > 1
    assert len({(mirrored, upside_down) for _, mirrored, upside_down in seen}) > 1

    def one(x: Tensor, n: int) -> Tensor:
        (top, left, height, width), mirrored, upside_down = seen[n]
        x = tv.crop(tv.pad(x, [4], fill=0.5), top + 4, left + 4, height, width)
        x = tv.horizontal_flip(x) if mirrored else x
        return tv.vertical_flip(x) if upside_down else x

    assert torch.equal(augment(images.to(device), index=INDEX).cpu(), each(images, one))


@pytest.mark.parametrize("flipped", [False, True])
def test_random_affine(flipped, tv, device):
    """RandomAffine after RandomHorizontalFlip, ColorJitter and Normalize, of whole images."""
    images = photographs(4)
    augment = cnn.Augment(
        (H, W), crop_scale=None, padding=0, horizontal_flip_p=float(flipped), degrees=40, translate=(0.2, 0.3),
        scale=(0.7, 1.4), shear=15, **FULL_JITTER, mean=MEAN, std=STD, seed=9,
    )  # fmt: skip
    draws = augment.draw((H, W), INDEX)
    assert draws.colours is not None
    maps = draws.maps.clone()
    if flipped:
        maps[:, 0] = torch.tensor([0.0, 0.0, W]) - maps[:, 0]
    numbers = [affine_numbers(one) for one in maps]
    for found in numbers:
        assert abs(found["angle"]) <= 40
        assert 0.7 - 1e-6 <= found["scale"] <= 1.4 + 1e-6
        assert abs(found["shear"][0]) <= 15
        assert max(abs(v - round(v)) for v in found["translate"]) < 1e-4
    mean, std = as_float32(MEAN, STD)
    bilinear = package("torchvision.transforms").InterpolationMode.BILINEAR

    def one(x: Tensor, n: int) -> Tensor:
        x = tv.affine(tv.horizontal_flip(x) if flipped else x, **numbers[n], interpolation=bilinear)
        return tv.normalize(recoloured(x, draws.colours[n].tolist()), mean, std)

    mine = augment(images.to(device), index=INDEX).cpu()
    assert_as_good(mine, images, lambda x: each(x, one), floor=SAMPLED / min(STD))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "soft labels"])
def test_mixing(kind, soft, tv, device):
    """MixUp and CutMix of images and labels, with a weight or box of each image's own."""
    images, labels = photographs(4), torch.tensor([0, 2, 1, 2])
    hot = torch.nn.functional.one_hot(labels, 3)
    augment = cnn.Augment((H, W), horizontal_flip_p=0, crop_scale=None, padding=0, **{f"{kind}_alpha": 0.8},
                          num_classes=3, **PLAIN)  # fmt: skip
    partners = augment.draw((H, W), INDEX).partners
    assert partners is not None
    assert len({float(row[1:].sum()) for row in partners}) > 1
    transform = getattr(package("torchvision.transforms.v2"), "MixUp" if kind == "mixup" else "CutMix")(num_classes=3)

    def mixed(x: Tensor, are_labels: bool = False) -> Tensor:
        """torchvision mixes each image with the one before it: here with its partner, in a batch of two."""
        parts = []
        for n, (partner, weight, *box) in enumerate(partners.tolist()):
            left, top, right, bottom = map(int, box)
            rest = 1 - (right - left) * (bottom - top) / (H * W)
            pair = torch.stack([x[n], x[int(partner)]])
            numbers = {"lam": weight, "box": (left, top, right, bottom), "lam_adjusted": rest, "batch_size": 2}
            parts.append(transform.transform(pair, {"labels": pair if are_labels else None, **numbers})[0])
        return torch.stack(parts)

    y, mine = augment(images.to(device), (hot.float() if soft else labels).to(device), index=INDEX)
    assert_as_good(y.cpu(), images, mixed)
    torch.testing.assert_close(mine.cpu().double(), mixed(hot.double(), are_labels=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("extents", [(31, 47), (40, 26)], ids=["wide", "high"])
def test_evaluation(extents, tv, device):
    """Resize(14), CenterCrop, Normalize."""
    size = (12, 13)
    images = photographs(2, height=extents[0], width=extents[1])
    augment = cnn.Augment(size, resize_size=14, mean=MEAN, std=STD, degrees=30, **FULL_JITTER).eval()
    mean, std = as_float32(MEAN, STD)

    def chain(x: Tensor) -> Tensor:
        return tv.normalize(tv.center_crop(tv.resize(x, [14], antialias=False), list(size)), mean, std)

    assert_as_good(augment(images.to(device)).cpu(), images, chain, floor=SAMPLED / min(STD))


BUSY = cnn.Augment(
    (10, 17), degrees=20, shear=5, **FULL_JITTER, erasing_p=0.5, erasing_value="random", seed=11, dtype=torch.float16
)


def test_an_image_is_the_same_in_every_batch(device):
    """By its index and epoch: in any order, any part of the batch, beside images of other sizes."""
    images = (photographs(4) * 255).round().to(torch.uint8)
    whole = BUSY(images.to(device), index=INDEX, epoch=1)
    for chosen in ([2], [3, 1, 0, 2], [0, 0, 3]):
        part = BUSY(images[chosen].to(device), index=[INDEX[i] for i in chosen], epoch=1)
        assert torch.equal(part, whole[chosen])
    packed = F.pack_images([images[1], images[2, :, :9, :20], images[0]])
    among = BUSY(tuple(t.to(device) for t in packed), index=[INDEX[1], 5, INDEX[0]], epoch=1)
    assert torch.equal(among[[0, 2]], whole[[1, 0]])
    assert not torch.equal(BUSY(images.to(device), index=INDEX, epoch=2), whole)
