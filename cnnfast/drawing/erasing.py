"""The erased box of each image, by the rules of torchvision's RandomErasing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counters import Dice, Draw, below, between, first_of, tries_of
from .frames import extents


@dataclass(frozen=True, slots=True)
class Erasing:
    """RandomErasing's p, scale (part of the area) and ratio (of height to width). values: what each channel of the box
    becomes, before it is normalised, or one for all; None: normal noise.
    """

    p: float
    scale: tuple[float, float]
    ratio: tuple[float, float]
    values: tuple[float, ...] | None

    @property
    def draws(self) -> tuple[int, ...]:
        noise = (Draw.NOISE,) if self.values is None else ()
        return (Draw.COINS, *tries_of(Draw.ERASING), *noise) if self.p else ()

    def boxes(self, dice: Dice, size: tuple[int, int]) -> np.ndarray:
        """Left, top, right, bottom, float64 [4, N]; empty where the coin says so, and where no try is smaller than the
        image.
        """
        P, Q = size
        area, ratio, x, y = dice.tries(Draw.ERASING)
        height, width = extents(P * Q * between(*self.scale, area), self.ratio, ratio)
        fits = (height < P) & (width < Q)
        width, height, x, y = first_of(fits, width, height, x, y)
        left, top = below(Q - width + 1, x), below(P - height + 1, y)
        erased = (dice[Draw.COINS][3] < self.p) & fits.any(0)
        return np.where(erased, np.stack((left, top, left + width, top + height)), 0.0)

    def draw(self, dice: Dice, size: tuple[int, int], channels: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(boxes: float32 [N, 1, 4 + channels], or [N, 1, 4] with noise; noise: int64 [N] seeds), None where there are
        none. Raises ValueError if images of so many channels cannot have these values.
        """
        if not self.draws:
            return None, None
        box = self.boxes(dice, size).T
        if self.values is None:
            low, high, _, _ = dice.words(Draw.NOISE)
            return box.astype(np.float32)[:, None], (high << 32) | low
        if len(self.values) not in (1, channels):
            raise ValueError(
                f"Augment(): mean, std and erasing_value must be one number, or one for each channel of the images, "
                f"which have {channels}, but got {len(self.values)}"
            )
        boxes = np.empty((len(dice), 1, 4 + channels), np.float32)
        boxes[:, 0, :4] = box
        boxes[:, 0, 4:] = self.values
        return boxes, None
