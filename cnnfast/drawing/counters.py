"""Uniform numbers by their names: each is a function of (seed, epoch, index of the image, draw) alone, so that an image
gets the same ones in every batch, order, process and machine, and no option's numbers depend on another option.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from ..philox import LOW, rounds

TRIES = 10  # of a crop and of an erased box, as torchvision's


class Draw(IntEnum):
    """What a counter's last word says. Each draw has four numbers. A number that has been given to an option stays with
    it: another one would change what a seed gives.
    """

    COINS = 0  # horizontal flip, vertical flip, grey, erased
    COLOURS = 1  # brightness, contrast, saturation, hue
    AFFINE = 2  # angle, shift to the right, shift down, scale
    SHEAR = 3  # along x, along y
    MIXING = 4  # two for the weight, and the centre of the box
    NOISE = 5  # two words of a seed
    PARTNER = 6  # of a batch, by its first image: the shift to the partners, mixup or cutmix
    PADDED_CROP = 7  # left, top
    CROP = 16  # and the TRIES - 1 after it: area, ratio, left, top
    ERASING = 32  # and the TRIES - 1 after it: area, ratio, left, top


def words(seed: int, epoch: int, index: np.ndarray, draws: Sequence[int]) -> np.ndarray:
    """Words of 32 bits in int64, [D, 4, N], for D draws and N images by their indices (int64)."""
    draw = np.array(draws, np.int64)[:, None]
    counter = (index & LOW, index >> 32 & LOW, np.full_like(index, epoch), draw)
    key = (np.array(seed & LOW), np.array(seed >> 32 & LOW))
    return np.stack(rounds(counter, key), 1)


def uniform(drawn: np.ndarray) -> np.ndarray:
    """Words as numbers in (0, 1), neither end included: the middles of 2**32 equal parts, exact in float64."""
    return (drawn + 0.5) * 2.0**-32


def tries_of(draw: Draw) -> tuple[int, ...]:
    return tuple(range(draw, draw + TRIES))


class Dice:
    """The uniform numbers of the images of a batch: dice[draw] is [4, N] in float64, within (0, 1).

    draws: those that will be asked for, which are computed together; any other is computed when it is asked for.
    """

    def __init__(self, seed: int, epoch: int, index: np.ndarray, draws: Sequence[int] = ()) -> None:
        self.seed, self.epoch, self.index = seed, epoch, index
        self.drawn = dict(zip(draws, words(seed, epoch, index, draws), strict=True)) if draws else {}

    def __len__(self) -> int:
        return len(self.index)

    def words(self, draw: int) -> np.ndarray:
        """The words that dice[draw] is made of: [4, N], int64."""
        if draw not in self.drawn:
            self.drawn[draw] = words(self.seed, self.epoch, self.index, [draw])[0]
        return self.drawn[draw]

    def __getitem__(self, draw: int) -> np.ndarray:
        return uniform(self.words(draw))

    def tries(self, draw: Draw) -> np.ndarray:
        """Of all tries: [4, TRIES, N]."""
        return uniform(np.stack([self.words(attempt) for attempt in tries_of(draw)], 1))

    def of_the_batch(self, draw: int) -> np.ndarray:
        """Four numbers that a batch has by its first image."""
        return self[draw][:, 0]


def first_of(fits: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Of values [TRIES, N] those of the first try that fits, [N]; where none does, of the first."""
    chosen = fits.argmax(0)[None]
    return [np.take_along_axis(value, chosen, 0)[0] for value in values]


def between(low: float, high: float, u: np.ndarray) -> np.ndarray:
    """Uniform numbers u as numbers in [low, high]."""
    return np.minimum(low + u * (high - low), high)


def below(counts: np.ndarray | int, u: np.ndarray) -> np.ndarray:
    """Uniform numbers u as whole numbers from 0 to counts - 1, in float64."""
    return np.floor(u * counts)
