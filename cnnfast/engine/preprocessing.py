"""From an image file to what a network takes: sizes, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """resize: of the shorter side, or (height, width), in pixels. crop: (height, width), from the middle. mean, std:
    one number a channel, of values from 0 to 1.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
