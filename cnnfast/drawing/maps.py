"""The map of each image, from a position in the result to one in the image: the result's frame is turned, sheared,
scaled and shifted as by torchvision's RandomAffine, flipped, and laid on the crop.

Everything is float64, and rounded to float32 at the end. Without rotation, shear and scale every step is exact if the
crop is not resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .counters import Dice, Draw, between
from .elementary import sine_and_cosine, tangent
from .frames import Frame


class AffineMaps(NamedTuple):
    """x' = xx x + xy y + x0, y' = yx x + yy y + y0: [N] each, or numbers that all images have in common."""

    xx: np.ndarray
    xy: np.ndarray
    x0: np.ndarray
    yx: np.ndarray
    yy: np.ndarray
    y0: np.ndarray

    def then_scaled(
        self, x_factor: np.ndarray, x_shift: np.ndarray, y_factor: np.ndarray, y_shift: np.ndarray
    ) -> AffineMaps:
        """Followed by x'' = x_factor x' + x_shift, y'' = y_factor y' + y_shift."""
        return AffineMaps(
            self.xx * x_factor, self.xy * x_factor, self.x0 * x_factor + x_shift,
            self.yx * y_factor, self.yy * y_factor, self.y0 * y_factor + y_shift,
        )  # fmt: skip

    def rounded(self, images: int) -> np.ndarray:
        """float32 [N, 2, 3]."""
        maps = np.empty((images, 6), np.float32)
        for column, values in enumerate(self):
            maps[:, column] = values
        return maps.reshape(images, 2, 3)


IDENTITY = AffineMaps(*(np.array(v) for v in (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)))


@dataclass(frozen=True, slots=True)
class Flips:
    """RandomHorizontalFlip's and RandomVerticalFlip's p."""

    horizontal_p: float
    vertical_p: float

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw.COINS,) if self.horizontal_p or self.vertical_p else ()

    def draw(self, dice: Dice, maps: AffineMaps, size: tuple[int, int]) -> AffineMaps:
        if not self.draws:
            return maps
        horizontal, vertical, _, _ = dice[Draw.COINS]
        flipped_x, flipped_y = horizontal < self.horizontal_p, vertical < self.vertical_p
        P, Q = size
        return maps.then_scaled(
            np.where(flipped_x, -1.0, 1.0), flipped_x * float(Q), np.where(flipped_y, -1.0, 1.0), flipped_y * float(P)
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """RandomAffine: degrees (two), parts of width and height, factors (two), degrees of shear (two or four)."""

    degrees: tuple[float, ...]
    translate: tuple[float, ...] | None
    scale: tuple[float, float] | None
    shear: tuple[float, ...] | None

    @property
    def draws(self) -> tuple[Draw, ...]:
        turned = any(self.degrees) or any(self.translate or ()) or self.scale not in (None, (1.0, 1.0))
        return (Draw.AFFINE,) * turned + (Draw.SHEAR,) * any(self.shear or ())

    def draw(self, dice: Dice, size: tuple[int, int]) -> AffineMaps:
        """The inverse of torchvision's matrix (torchvision.transforms.functional._get_inverse_affine_matrix), around
        the middle of the result.
        """
        if not self.draws:
            return IDENTITY
        P, Q = size
        angle, right, down, factor = dice[Draw.AFFINE]
        rotation = between(self.degrees[0], self.degrees[1], angle)
        x_part, y_part = self.translate or (0.0, 0.0)
        dx = np.rint(between(-x_part * Q, x_part * Q, right))
        dy = np.rint(between(-y_part * P, y_part * P, down))
        scale = between(*(self.scale or (1.0, 1.0)), factor)
        x_tan, y_cosine, y_shear = 0.0, 1.0, 0.0
        if self.shear is not None:
            along_x, along_y, _, _ = dice[Draw.SHEAR]
            x_tan = tangent(between(self.shear[0], self.shear[1], along_x))
            if len(self.shear) == 4:
                y_shear = between(self.shear[2], self.shear[3], along_y)
                _, y_cosine = sine_and_cosine(y_shear)
        sine, cosine = sine_and_cosine(rotation)
        skew_sine, skew_cosine = sine_and_cosine(rotation - y_shear)
        a, c = skew_cosine / y_cosine, skew_sine / y_cosine
        b, d = -a * x_tan - sine, cosine - c * x_tan
        xx, xy, yx, yy = d / scale, -b / scale, -c / scale, a / scale
        x, y = -0.5 * Q - dx, -0.5 * P - dy
        return AffineMaps(xx, xy, xx * x + xy * y + 0.5 * Q, yx, yy, yx * x + yy * y + 0.5 * P)


def onto(frame: Frame, maps: AffineMaps, size: tuple[int, int]) -> AffineMaps:
    """Followed by the map from the result's frame to the part of the image that it shows."""
    P, Q = size
    return maps.then_scaled(frame.width / Q, frame.left, frame.height / P, frame.top)
