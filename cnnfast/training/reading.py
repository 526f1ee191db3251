"""Where the images of a set are: in files, or in memory. And how one of them becomes pixels that one map can sample."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..engine.images.images import CHANNELS, look, pillow, read, to_mode

if TYPE_CHECKING:
    from PIL.Image import Image

# Bilinear interpolation reads the 2 x 2 pixels next to a position. Where an image has more than twice as many pixels as
# its result, it would pass over some of them, and what it draws would flicker with the position.
MOST_PIXELS_OF_A_RESULTS = 2


class SampleSource(Protocol):
    """Images by their number, from 0."""

    def name(self, i: int) -> str:
        """What a user calls image i: its file."""
        ...

    def read(self, i: int, at_least: int | None) -> Image:
        """Image i, upright; at_least as in engine/images/images.py. Raises UnreadableImage."""
        ...

    def look(self, i: int) -> tuple[int, int]:
        """(width, height) of image i, without its pixels. Raises UnreadableImage."""
        ...

    def taken(self, indices: Tensor) -> SampleSource:
        """These images only, int64 [n], in this order."""
        ...


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Files below a folder. Their names, in the bytes of the file system, stand one after the other in one tensor, and
    name n ends before byte ends[n]: a list of a million objects would be copied into each process that reads images.

    names: uint8 [bytes]; ends: int64 [N].
    """

    folder: str
    names: Tensor
    ends: Tensor

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> ImageFiles:
        """names: relative to the folder, or absolute."""
        encoded = [os.fsencode(name) for name in names]
        ends = torch.tensor([len(name) for name in encoded], dtype=torch.int64).cumsum(0)
        return cls(str(folder), torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8), ends)

    def name(self, i: int) -> str:
        begin = int(self.ends[i - 1]) if i else 0
        return os.path.join(self.folder, os.fsdecode(self.names[begin : int(self.ends[i])].numpy().tobytes()))

    def read(self, i: int, at_least: int | None) -> Image:
        return read(Path(self.name(i)), at_least=at_least)

    def look(self, i: int) -> tuple[int, int]:
        return look(Path(self.name(i)))

    def taken(self, indices: Tensor) -> ImageFiles:
        return ImageFiles.of(Path(self.folder), [self.name(i) for i in indices.tolist()])


@dataclass(frozen=True, eq=False)
class HeldImages:
    """Grey images in memory. pixels: uint8 [N, H, W]. numbers: int64 [N], which with `noun` are their names."""

    pixels: Tensor
    numbers: Tensor
    noun: str

    def name(self, i: int) -> str:
        return f"{self.noun} {int(self.numbers[i])}"

    def read(self, i: int, at_least: int | None) -> Image:
        return pillow().fromarray(self.pixels[i].numpy())

    def look(self, i: int) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[1]

    def taken(self, indices: Tensor) -> HeldImages:
        return HeldImages(self.pixels[indices], self.numbers[indices], self.noun)


def digits() -> tuple[HeldImages, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, from 0 to 16 there, and what they are, int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'the digits are scikit-learn\'s, which is not installed: pip install ".[train]"', name="sklearn"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    white = (pixels * 255 / 16).round().astype("uint8").reshape(-1, 8, 8)
    held = HeldImages(torch.from_numpy(white), torch.arange(len(white)), "digit")
    return held, torch.from_numpy(labels).to(torch.int64)


def read_for_training(source: SampleSource, i: int, channels: int, size: int) -> Tensor:
    """Image i as uint8 [H, W, channels]. Where its shorter side has more than 2 * `size` pixels, it is made smaller by
    a whole number, such that from `size` to 2 * `size` of them are left, and each is the mean of those that it stands
    for. Raises UnreadableImage.
    """
    most = MOST_PIXELS_OF_A_RESULTS * size
    image = to_mode(source.read(i, most), CHANNELS[channels])
    factor = -(-min(image.size) // most)
    return as_tensor(image if factor == 1 else image.reduce(factor))


def as_tensor(image: Image) -> Tensor:
    """uint8 [H, W, C], with memory of its own."""
    import numpy as np

    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1))
