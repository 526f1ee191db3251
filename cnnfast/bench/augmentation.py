"""`cnnfast bench augment`: what is measured, a recipe of augmentation on a batch of images, and what is right.

A recipe names its options as torchvision.transforms.v2 does. What it makes of an image is drawn, and each library draws
its own numbers. So what is judged are pinned recipes, in each of which every option has but one value to draw, made by
the same code as the recipe that is timed (augmenters.py); of ours also one batch with the numbers that cnn.Augment
draws for it. The boxes of random erasing are judged in that one alone: no option says where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as cnn
from . import AUGMENT
from .gate import SUM, UNITS, Expected, relative_errors
from .job import Job
from .providers import Provider
from .roofline import Kernel, Work
from .rows import AUGMENTATION
from .task import Task

ONE_PASS = "one pass"  # the level of fusion at which images are read once, and results written once
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.2989, 0.587, 0.114)  # the weights of red, green and blue, as torchvision has them
JUDGED = 4  # images of a batch

Range = tuple[float, float]
WHOLE: Range = (1.0, 1.0)


@dataclass(frozen=True)
class Recipe:
    """What happens to a batch: a random resized crop, and then each of these that is not at its default. Names and
    meanings are those of torchvision.transforms.v2; degrees, brightness, contrast, saturation and hue are ranges.
    """

    name: str
    crop_scale: Range = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    horizontal_flip_p: float = 0.5
    degrees: Range | None = None
    brightness: Range | None = None
    contrast: Range | None = None
    saturation: Range | None = None
    hue: Range | None = None
    grayscale_p: float = 0.0
    erasing_p: float = 0.0

    @property
    def jitters(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    def ours(self, size: int, dtype: torch.dtype) -> cnn.Augment:
        """The same by cnnfast."""
        options = {name: value for name, value in vars(self).items() if name != "name" and value is not None}
        return cnn.Augment(size, **options, mean=MEAN, std=STD, dtype=dtype)

    def pinned(self) -> list[Pinned]:
        """Recipes that leave nothing to chance: the whole image, resized and flipped, and then, on images that need no
        resizing, the flip and each other step of this one by itself.
        """
        whole = Recipe("flip", WHOLE, WHOLE, 1.0)
        found = [Pinned(whole, resized=True), Pinned(whole)]
        for name, value in (("brightness", 0.7), ("contrast", 1.3), ("saturation", 0.6), ("hue", 0.08)):
            if getattr(self, name):
                found.append(Pinned(replace(whole, name=name, **{name: (value, value)})))
        if self.grayscale_p:
            found.append(Pinned(replace(whole, name="grayscale", grayscale_p=1.0)))
        if self.degrees:
            found.append(Pinned(replace(whole, name="degrees", degrees=(20.0, 20.0))))
        return found


LIGHT = Recipe("crop, flip")
USUAL = replace(
    LIGHT,
    name="crop, flip, colours, erasing",
    brightness=(0.6, 1.4),
    contrast=(0.6, 1.4),
    saturation=(0.6, 1.4),
    hue=(-0.1, 0.1),
    grayscale_p=0.2,
    erasing_p=0.25,
)
ROTATED = replace(USUAL, name="crop, flip, rotation, colours, erasing", degrees=(-15.0, 15.0))
RECIPES = (LIGHT, USUAL, ROTATED)


@dataclass(frozen=True)
class Pinned:
    """A recipe that has one result, on images that are larger than it, if `resized`, or as large."""

    recipe: Recipe
    resized: bool = False

    def images(self, size: int, device: torch.device) -> Tensor:
        """The same uint8 images [JUDGED, 3, side, side] every time."""
        side = size * 8 // 7 if self.resized else size
        drawn = torch.randint(0, 256, (JUDGED, 3, side, side), generator=torch.Generator().manual_seed(0))
        return drawn.to(device, torch.uint8)

    def compared(self, y: Tensor) -> Tensor:
        """The part of a result that is judged: of a rotated one its middle, since what stands at the border of an image
        that was turned each library decides for itself.
        """
        quarter = y.shape[-1] // 4 if self.recipe.degrees else 0
        return y[..., quarter : y.shape[-2] - quarter, quarter : y.shape[-1] - quarter]

    def right(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The result, computed in `dtype`."""
        r, images = self.recipe, self.images(size, device)
        degrees = r.degrees[0] if r.degrees else 0.0
        factors = (each[0] if each else 1.0 for each in (r.brightness, r.contrast, r.saturation))
        colours = torch.tensor([[*factors, r.hue[0] if r.hue else 0.0, r.grayscale_p]], dtype=torch.float64)
        maps = flipped_and_turned(images.shape[-1], size, degrees)
        return self.compared(by_numbers(images, maps, colours, None, size, dtype))


def flipped_and_turned(side: int, size: int, degrees: float) -> Tensor:
    """The map [1, 2, 3] from square results to square images that are flipped, and then turned clockwise."""
    cos, sin, centre = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), size / 2
    turned = torch.tensor(
        [[cos, sin, centre * (1 - cos - sin)], [-sin, cos, centre * (1 - cos + sin)], [0, 0, 1]], dtype=torch.float64
    )
    flip = torch.tensor([[-1, 0, size], [0, 1, 0]], dtype=torch.float64)
    return side / size * (flip @ turned)[None]


# ----------------------------------------------------------------------------------------------------------------------
# What is right, by explicit numbers


def by_numbers(
    images: Tensor, maps: Tensor, colours: Tensor | None, boxes: Tensor | None, size: int, dtype: torch.dtype,
    padding_mode: str = "reflection",
) -> Tensor:  # fmt: skip
    """What functional.augment makes of uint8 images [N, 3, H, W], step by step in `dtype`. maps: of each image, or one
    for all. padding_mode: as grid_sample has it.
    """
    (H, W), N = images.shape[-2:], len(images)
    maps = maps.to(images.device, dtype).expand(N, 2, 3)
    centres = torch.arange(size, dtype=dtype, device=images.device) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], -1) @ maps[:, None].mT  # [N, size, size, 2]
    extents = torch.tensor([W, H], dtype=dtype, device=images.device)
    v = F.grid_sample(images.to(dtype) / 255, 2 * places / extents - 1, "bilinear", padding_mode, align_corners=False)
    if colours is not None:
        v = _recoloured(v, colours.to(images.device, dtype).view(-1, 5, 1, 1, 1).unbind(1))
    for box in [] if boxes is None else boxes.to(images.device, dtype).unbind(1):
        left, top, right, bottom = box[:, :4, None, None].unbind(1)
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        v = torch.where(inside[:, None], box[:, 4:, None, None], v)
    return (v - _channels(MEAN, v)) / _channels(STD, v)


def _recoloured(v: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    brightness, contrast, saturation, hue, grey = numbers
    v = (brightness * v).clamp(0, 1)
    v = (contrast * v + (1 - contrast) * _grey(v).mean((-3, -2, -1), keepdim=True)).clamp(0, 1)
    v = (saturation * v + (1 - saturation) * _grey(v)).clamp(0, 1)
    v = torch.where(hue == 0, v, _with_hue(v, hue))
    return torch.where(grey == 0, v, _grey(v))


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)


def _grey(v: Tensor) -> Tensor:
    return (v * _channels(GREY, v)).sum(1, keepdim=True)


def _with_hue(v: Tensor, turns: Tensor) -> Tensor:
    """The hue of HSV is shifted (https://en.wikipedia.org/wiki/HSL_and_HSV)."""
    red, green, blue = v.unbind(1)
    value, span = v.amax(1), v.amax(1) - v.amin(1)
    divisor = torch.where(span == 0, 1, span)
    from_green, from_blue = 2 + (blue - red) / divisor, 4 + (red - green) / divisor
    sixths = torch.where(value == red, (green - blue) / divisor, torch.where(value == green, from_green, from_blue))
    k = (_channels((5, 3, 1), v) + sixths.unsqueeze(1) + 6 * turns) % 6
    return value.unsqueeze(1) - span.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The job


@dataclass(frozen=True)
class AugmentationJob(Job):
    """A recipe on a batch of uint8 images, [N, 3, H, W] or [N, H, W, 3], to a normalised batch of `dtype` of height and
    width `size`. There is no model.
    """

    recipe: Recipe = LIGHT
    size: int = 224

    @property
    def input(self) -> str:
        return f"{super().input} to {self.size}x{self.size}"

    def inputs(self, channels_last: bool = True) -> list[Tensor]:
        """The images, with the same numbers every time. They are laid out as `shapes` says."""
        drawn = self.numbers.normal(0, self.shapes[0], self.device)
        return [(drawn * 64 + 128).clamp(0, 255).to(torch.uint8)]

    def images(self) -> Tensor:
        """The same as [N, 3, H, W], where their memory stays as it is."""
        (images,) = self.inputs()
        return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


class AugmentationTask(Task):
    """A recipe, and the providers that are to do it."""

    def __str__(self) -> str:
        return f"{AUGMENT}: {self.job.name}, batch {self.job.batch}"

    def level_of(self, provider: Provider) -> str:
        return ONE_PASS

    def expected(self, job: Job) -> Expected:
        """What the pinned recipes give, and the first images by the numbers that ours draws for them: in float64. The
        errors of plain PyTorch beside it are those of float32, rounded to the job's dtype.
        """
        assert isinstance(job, AugmentationJob)

        def right(dtype: torch.dtype) -> list[Tensor]:
            images, ours = job.images()[:JUDGED], job.recipe.ours(job.size, job.dtype)
            draws = ours.draw(tuple(images.shape[2:]), range(len(images)))
            mode = "zeros" if ours.seen_border == "constant" else "reflection"
            drawn = by_numbers(images, draws.maps, draws.colours, draws.boxes, job.size, dtype, mode)
            return [*(each.right(job.size, job.device, dtype) for each in job.recipe.pinned()), drawn]

        exact, plain = right(torch.float64), [t.to(job.dtype) for t in right(torch.float32)]
        floor = UNITS * torch.finfo(job.dtype).eps + SUM * torch.finfo(torch.float32).eps
        return Expected(exact, relative_errors(plain, exact), floor, "float64", None)


def augmentation_task(
    recipe: Recipe, images: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device,
    providers: Sequence[Provider],
) -> AugmentationTask:  # fmt: skip
    """The least bytes are those of the images, each read once, and of the results, each written once."""
    job = AugmentationJob(recipe.name, nn.Identity(), (images,), AUGMENT, dtype, device, recipe=recipe, size=size)
    written = job.batch * 3 * size**2 * dtype.itemsize
    work = {ONE_PASS: Work((Kernel((AUGMENT,), 0, math.prod(images) + written),))}
    return AugmentationTask(job, providers, work, AUGMENTATION)
