"""The frame: which part of an image is seen, before it is flipped and turned. Random crops resized to the size of the
result, random crops of that size, and the resized centre crop of evaluation, each with torchvision's rules and rounding
(RandomResizedCrop, RandomCrop, and Resize with CenterCrop, of torchvision.transforms.v2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .counters import Dice, Draw, below, between, first_of, tries_of
from .elementary import exp, log


class Frame(NamedTuple):
    """A rectangle in each image that fills its result: [N] each, in pixels of the image, float64. It may lie partly
    outside.
    """

    left: np.ndarray
    top: np.ndarray
    width: np.ndarray
    height: np.ndarray


def extents(area: np.ndarray, bounds: tuple[float, float], u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rectangles, in whole pixels: the first over the second is within `bounds`, uniform in its logarithm."""
    low, high = log(np.array(bounds))
    ratio = exp(between(low, high, u))
    return np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))


@dataclass(frozen=True, slots=True)
class ResizedCrop:
    """RandomResizedCrop: a part of the image's area within `scale`, its ratio of width to height within `ratio`."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    draws = tries_of(Draw.CROP)

    def leaves(self, size: tuple[int, int]) -> bool:
        """Whether a crop may reach beyond the image."""
        return False

    def fallback(self, H: np.ndarray, W: np.ndarray) -> Frame:
        """The largest part in the middle whose ratio is within bounds, for images in which no try fits."""
        ratio = W / H
        height = np.where(ratio < self.ratio[0], np.maximum(np.rint(W / self.ratio[0]), 1), H)
        width = np.where(ratio > self.ratio[1], np.maximum(np.rint(H * self.ratio[1]), 1), W)
        return Frame(np.floor((W - width) / 2), np.floor((H - height) / 2), width, height)

    def draw(self, dice: Dice, H: np.ndarray, W: np.ndarray, size: tuple[int, int]) -> Frame:
        area, ratio, x, y = dice.tries(Draw.CROP)
        width, height = extents(H * W * between(*self.scale, area), self.ratio, ratio)
        fits = (0 < width) & (width <= W) & (0 < height) & (height <= H)
        width, height, x, y = first_of(fits, width, height, x, y)
        frame = Frame(below(W - width + 1, x), below(H - height + 1, y), width, height)
        found = fits.any(0)
        if found.all():
            return frame
        return Frame(*(np.where(found, drawn, other) for drawn, other in zip(frame, self.fallback(H, W), strict=True)))


@dataclass(frozen=True, slots=True)
class PaddedCrop:
    """RandomCrop: as many pixels of the image as the result has, after padding (left, top, right, bottom)."""

    padding: tuple[int, int, int, int]
    draws = (Draw.PADDED_CROP,)

    def leaves(self, size: tuple[int, int]) -> bool:
        return any(self.padding)

    def draw(self, dice: Dice, H: np.ndarray, W: np.ndarray, size: tuple[int, int]) -> Frame:
        """Raises ValueError where an image is smaller than the result, as RandomCrop does."""
        left, top, right, bottom = self.padding
        P, Q = size
        room_y, room_x = H + (top + bottom - P), W + (left + right - Q)
        small = np.flatnonzero((room_y < 0) | (room_x < 0))
        if len(small):
            n = small[0]
            raise ValueError(
                f"Augment(): size {size} is larger than image {n}, of {int(H[n])} x {int(W[n])} pixels, with "
                f"padding={self.padding} (left, top, right, bottom) on its sides"
            )
        u = dice[Draw.PADDED_CROP]
        return Frame(
            below(room_x + 1, u[0]) - left, below(room_y + 1, u[1]) - top, np.full_like(W, Q), np.full_like(H, P)
        )


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """Resize and CenterCrop: the shorter side is resized to `resize` pixels, and the middle of it is seen."""

    resize: int
    draws = ()

    def leaves(self, size: tuple[int, int]) -> bool:
        return self.resize < max(size)

    def draw(self, dice: Dice | None, H: np.ndarray, W: np.ndarray, size: tuple[int, int]) -> Frame:
        """Nothing is drawn: `dice` is not used."""
        left, width = self.axis(W, H, size[1])
        top, height = self.axis(H, W, size[0])
        return Frame(left, top, width, height)

    def axis(self, extent: np.ndarray, other: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(where the crop starts, how long it is), along an axis, in pixels of the image."""
        resized = np.floor(self.resize * np.maximum(extent, other) / np.minimum(extent, other))
        resized = np.where(extent <= other, self.resize, resized)
        room = resized - size
        start = np.where(room < 0, -np.floor(-room / 2), np.rint(room / 2))  # of an odd room, padded or cut
        return start * extent / resized, size * extent / resized
