"""The colours of each image: ColorJitter's factors, and RandomGrayscale's coin (torchvision.transforms.v2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counters import Dice, Draw, between

UNCHANGED = ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0))


@dataclass(frozen=True, slots=True)
class Jitter:
    """Least and largest factors of brightness, contrast and saturation, and shifts of hue in turns; p of grey."""

    brightness: tuple[float, float]
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: tuple[float, float]
    grayscale_p: float

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        return (self.brightness, self.contrast, self.saturation, self.hue)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw.COLOURS,) * (self.ranges != UNCHANGED) + (Draw.COINS,) * (self.grayscale_p > 0)

    def draw(self, dice: Dice) -> np.ndarray | None:
        """float32 [N, 5], or None where no option changes a colour."""
        if not self.draws:
            return None
        colours = np.empty((len(dice), 5), np.float32)
        colours[:, :4] = [low for low, _ in UNCHANGED]
        for column, (low, high) in enumerate(self.ranges):
            if (low, high) != UNCHANGED[column]:
                colours[:, column] = between(low, high, dice[Draw.COLOURS][column])
        colours[:, 4] = dice[Draw.COINS][2] < self.grayscale_p if self.grayscale_p else 0
        return colours
