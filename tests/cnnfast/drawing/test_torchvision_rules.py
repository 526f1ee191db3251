"""The same uniform numbers, by torchvision's own code and by ours: the same crops, boxes, factors and maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cnnfast.drawing import (
    CentreCrop,
    Dice,
    Draw,
    Erasing,
    Flips,
    Jitter,
    Mixing,
    PaddedCrop,
    ResizedCrop,
    Turn,
    label_weights,
    onto,
)
from cnnfast.drawing.counters import tries_of
from cnnfast.drawing.mixing import cut, symmetric_beta
from tests.support.packages import package
from tests.support.scripted_torch import ScriptedTorch

GEOMETRY, COLOUR, AUGMENT = (f"torchvision.transforms.v2.{name}.torch" for name in ("_geometry", "_color", "_augment"))
INDEX = np.arange(60)
IMAGES = range(60)
SIZES = [(40, 60), (61, 33), (9, 120), (300, 17), (224, 224), (1, 1), (3, 2)]


@pytest.fixture(scope="session")
def v2():
    return package("torchvision.transforms.v2")


def dice(seed: int = 0) -> Dice:
    return Dice(seed, 0, INDEX)


def tries(draw: Draw, n: int) -> tuple[list[float], list[list[float]]]:
    """(area and ratio of each try, top and left of each) as torchvision asks for them."""
    drawn = [dice()[attempt][:, n] for attempt in tries_of(draw)]
    return [float(v) for area, ratio, _, _ in drawn for v in (area, ratio)], [[y, x] for _, _, x, y in drawn]


def exact_ratio(transform: Any) -> None:
    transform._log_ratio = [math.log(v) for v in transform.ratio]  # torchvision's own is float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.9, 1.1)), ((0.01, 0.2), (0.2, 5.0))]
)
def test_resized_crops(v2, monkeypatch, size, scale, ratio):
    """The fallback too, which the long images take."""
    H, W = (np.full(len(INDEX), float(v)) for v in size)
    frame = ResizedCrop(scale, ratio).draw(dice(), H, W, (32, 32))
    transform = v2.RandomResizedCrop(32, scale=scale, ratio=ratio)
    exact_ratio(transform)
    for n in IMAGES:
        monkeypatch.setattr(GEOMETRY, ScriptedTorch(*tries(Draw.CROP, n)))
        params = transform.make_params([torch.zeros(3, *size)])
        assert [values[n] for values in frame] == [params[key] for key in ("left", "top", "width", "height")]


@pytest.mark.parametrize(
    ("padding", "sides"), [(4, (4, 4, 4, 4)), ([1, 3], (1, 3, 1, 3)), ([0, 1, 2, 7], (0, 1, 2, 7))]
)
def test_padded_crops(v2, monkeypatch, padding, sides):
    size = (32, 27)
    H, W = (np.full(len(INDEX), float(v)) for v in (32, 29))
    frame = PaddedCrop(sides).draw(dice(), H, W, size)
    transform = v2.RandomCrop(size, padding=padding)
    for n in IMAGES:
        x, y, _, _ = dice()[Draw.PADDED_CROP][:, n]
        axes = [number for number, room in ((y, sides[1] + sides[3]), (x, 2 + sides[0] + sides[2])) if room]
        monkeypatch.setattr(GEOMETRY, ScriptedTorch(whole=[axes]))
        params = transform.make_params([torch.zeros(3, 32, 29)])
        left, top, _, _ = params["padding"]
        assert [values[n] for values in frame] == [params["left"] - left, params["top"] - top, 27, 32]


@pytest.mark.parametrize("size", [(32, 48), (5, 224), (1, 1)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.5, 1.0), (0.5, 8.0))])
def test_erased_boxes(v2, monkeypatch, size, scale, ratio):
    boxes = Erasing(1.0, scale, ratio, (0.0,)).boxes(dice(), size)
    transform = v2.RandomErasing(p=1, scale=scale, ratio=ratio)
    exact_ratio(transform)
    for n in IMAGES:
        monkeypatch.setattr(AUGMENT, ScriptedTorch(*tries(Draw.ERASING, n)))
        params = transform.make_params([torch.zeros(3, *size)])
        i, j, h, w = (params[key] for key in "ijhw")
        assert boxes[:, n].tolist() == ([0] * 4 if params["v"] is None else [j, i, j + w, i + h])


def test_colours(v2, monkeypatch):
    transform = v2.ColorJitter(brightness=0.4, contrast=(0.5, 3), saturation=1.5, hue=0.1)
    ranges = transform.brightness, transform.contrast, transform.saturation, transform.hue
    colours = Jitter(*ranges, grayscale_p=0.3).draw(dice())
    assert colours is not None
    for n in IMAGES:
        monkeypatch.setattr(COLOUR, ScriptedTorch(dice()[Draw.COLOURS][:, n].tolist()))
        params = transform.make_params([])
        factors = [params[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
        assert colours[n].tolist() == [*map(np.float32, factors), dice()[Draw.COINS][2, n] < 0.3]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_cutmix_boxes_and_weights(v2, monkeypatch, alpha):
    """And the shares of labels."""
    size = (33, 48)
    u, v, x, y = dice()[Draw.MIXING]
    boxes = cut(symmetric_beta(alpha, u, v), x, y, size)
    partners = Mixing(None, alpha).draw(dice(), size)
    assert partners is not None
    assert np.array_equal(partners[:, 2:], boxes.T.astype(np.float32))
    transform = v2.CutMix(alpha=alpha, num_classes=2)
    shares = label_weights(torch.from_numpy(partners), size)
    for n in IMAGES:
        transform._dist = type("Given", (), {"sample": lambda self, shape, n=n: symmetric_beta(alpha, u, v)[n]})()
        monkeypatch.setattr(AUGMENT, ScriptedTorch(whole=[[x[n], y[n]]]))
        params = transform.make_params([torch.zeros(3, *size)])
        assert tuple(boxes[:, n]) == params["box"]
        assert shares[n] == np.float32(params["lam_adjusted"])


def positions(H: int, W: int) -> torch.Tensor:
    """An image whose channels say where each pixel lies: bilinear samples of it are the positions sampled."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    return torch.stack([x, y]).double()


def mapped(maps: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """The positions that a map gives the pixels of a result, [2, P, Q]."""
    x, y = positions(*size)
    m = torch.from_numpy(maps).double()
    return torch.stack([m[0, 0] * x + m[0, 1] * y + m[0, 2], m[1, 0] * x + m[1, 1] * y + m[1, 2]])


AFFINE = {
    "rotation": {"degrees": (-50.0, 70.0)},
    "translation": {"degrees": (0.0, 0.0), "translate": (0.2, 0.3)},
    "scale": {"degrees": (0.0, 0.0), "scale": (0.5, 1.5)},
    "shear along x": {"degrees": (0.0, 0.0), "shear": (-20.0, 30.0)},
    "shear along both": {"degrees": (0.0, 0.0), "shear": (-20.0, 30.0, 10.0, 25.0)},
    "everything": {"degrees": (-9.0, 9.0), "translate": (0.1, 0.0), "scale": (0.8, 2), "shear": (-5.0, 5.0, -8.0, 8.0)},
}


@pytest.mark.parametrize("options", AFFINE.values(), ids=AFFINE.keys())
@pytest.mark.parametrize("resized", [True, False], ids=["resized crop", "padded crop"])
def test_maps_of_the_chain(v2, monkeypatch, options, resized):
    """crop > flips > affine, wherever torchvision's chain sees neither the edge of the crop nor what lies beyond it."""
    size, image = (40, 31), (70, 90)
    H, W = (np.full(len(INDEX), float(v)) for v in image)
    turn = Turn(**({"translate": None, "scale": None, "shear": None} | options))
    flips = Flips(0.5, 0.3)
    crop = ResizedCrop((0.3, 0.9), (0.5, 1.5)) if resized else PaddedCrop((0, 0, 0, 0))
    frame = crop.draw(dice(), H, W, size)
    maps = onto(frame, flips.draw(dice(), turn.draw(dice(), size), size), size).rounded(len(INDEX))
    transform = v2.RandomAffine(**options, interpolation=v2.InterpolationMode.BILINEAR)
    compared = 0
    for n in IMAGES[:25]:
        numbers = dice()[Draw.AFFINE][:, n].tolist()
        asked = [numbers[0], *(numbers[1:3] if turn.translate else []), *(numbers[3:] if turn.scale else [])]
        left, top, width, height = (int(values[n]) for values in frame)
        seen = v2.functional.resized_crop(positions(*image), top, left, height, width, list(size), antialias=False)
        horizontal, vertical, _, _ = dice()[Draw.COINS][:, n]
        seen = v2.functional.horizontal_flip(seen) if horizontal < 0.5 else seen
        seen = v2.functional.vertical_flip(seen) if vertical < 0.3 else seen
        monkeypatch.setattr(GEOMETRY, ScriptedTorch([*asked, *dice()[Draw.SHEAR][:, n]]))
        params = transform.make_params([seen])
        monkeypatch.setattr(GEOMETRY, torch)
        # Pixels at the edges of the crop are not interpolated as those within it: they are not compared.
        inner = torch.zeros(1, *size, dtype=torch.float64)
        inner[:, 2:-2, 2:-2] = 1
        same = transform.transform(inner, params)[0] == 1
        error = (transform.transform(seen, params) - mapped(maps[n], size)).abs().amax(0)[same]
        compared += len(error)
        assert len(error) == 0 or error.max() < 3e-5, (n, params)
    assert compared > 8000


@pytest.mark.parametrize("image", [(37, 52), (53, 36), (40, 40), (17, 200), (9, 9)])
@pytest.mark.parametrize(("size", "resize"), [((32, 32), 36), ((31, 24), 35), ((32, 33), 33)])
def test_evaluation_sees_what_resize_and_centre_crop_see(v2, image, size, resize):
    H, W = (np.full(1, float(v)) for v in image)
    maps = onto(CentreCrop(resize).draw(None, H, W, size), Turn((0.0, 0.0), None, None, None).draw(dice(), size), size)
    seen = v2.functional.center_crop(v2.functional.resize(positions(*image), [resize], antialias=False), list(size))
    ours = mapped(maps.rounded(1)[0], size)
    within = torch.stack([ours[0].clamp(0.5, image[1] - 0.5), ours[1].clamp(0.5, image[0] - 0.5)])
    assert (within - seen).abs().max() < 3e-5


@pytest.mark.parametrize(("size", "resize"), [((12, 20), 9), ((10, 17), 10), ((15, 15), 8)])
def test_a_centre_crop_larger_than_the_image_is_padded_as_torchvision_pads_it(v2, size, resize):
    """More pixels at the end than at the start, where they are odd: `start` is a whole number of resized pixels."""
    H, W = (np.full(1, float(v)) for v in (10, 14))
    left, top, width, height = (values[0] for values in CentreCrop(resize).draw(None, H, W, size))
    resized = v2.functional.resize(torch.ones(1, 10, 14), [resize], antialias=False)
    seen = v2.functional.center_crop(resized, list(size))[0] != 0
    rows, columns = resized.shape[-2:]
    inside_y = (torch.arange(size[0]) + 0.5) * height / size[0] + top
    inside_x = (torch.arange(size[1]) + 0.5) * width / size[1] + left
    inside = ((inside_y > 0) & (inside_y < 10))[:, None] & ((inside_x > 0) & (inside_x < 14))
    assert torch.equal(inside, seen), (rows, columns)
