"""From an image to what a network takes: its size, its crop, and the mean and standard deviation of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...spelling import did_you_mean, quoted, unknown_value
from .from_libraries import FORMS, fields_from, shortened
from .images import CHANNELS, pillow, resampling, to_mode

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..network import Network

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
FITS = ("stretch", "cover", "contain")
MOST_PIXELS = 16384  # of a side
MOST_RESIZED = 2**26  # pixels of a whole image once it is resized; one that is long and narrow enough would have more


@dataclass(frozen=True)
class Preprocessing:
    """An image is converted to "L", "RGB" or "RGBA", as many channels as there are means, then resized, then cropped in
    its middle, divided by 255, and normalised: (x - mean) / std.

    size: what the image is resized to, in pixels. A number: of its shorter side, and the longer side follows, rounded
    down, as torchvision does it. (height, width): as `fit` says. None: as it is.
    crop: (height, width), from the middle. Where the image is smaller, it is surrounded by `fill`. None: all of it.
    interpolation: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos", by Pillow, which smooths while it
    makes an image smaller.
    mean, std: one number a channel, of values from 0 to 1.
    fit: how an image is resized to (height, width). "stretch": to exactly this. "cover": it keeps its proportions, and
    is at least so high and so wide. "contain": it keeps its proportions, and is at most so high and so wide.
    fill: one number a channel, from 0 to 255; none of them stands for 0.

    Raises ValueError, which names the field, where one of them has no sense.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "stretch"
    fill: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (self.size is None or _is_length(self.size) or _is_pair(self.size)):
            raise _wrong("size", self.size, f"a number of pixels from 1 to {MOST_PIXELS}, (height, width), or None")
        if not (self.crop is None or _is_pair(self.crop)):
            raise _wrong("crop", self.crop, f"(height, width) in pixels from 1 to {MOST_PIXELS}, or None")
        if self.interpolation not in INTERPOLATIONS:
            raise unknown_value("Preprocessing", "interpolation", self.interpolation, INTERPOLATIONS)
        if self.fit not in FITS:
            raise unknown_value("Preprocessing", "fit", self.fit, FITS)
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if not (isinstance(numbers, tuple) and len(numbers) in CHANNELS and all(map(_is_finite, numbers))):
                raise _wrong(name, numbers, f"{quoted(CHANNELS)} numbers, one for each channel of an image")
        if len(self.mean) != len(self.std):
            raise _wrong("std", self.std, f"as many numbers as mean, which is {self.mean!r}")
        if any(torch.tensor(number, dtype=torch.float32).item() <= 0 for number in self.std):
            raise _wrong("std", self.std, "numbers above 0, in float32 too")
        if not (isinstance(self.fill, tuple) and all(type(v) is int and 0 <= v <= 255 for v in self.fill)):
            raise _wrong("fill", self.fill, "whole numbers from 0 to 255")
        if len(self.fill) not in (0, len(self.mean)):
            raise _wrong("fill", self.fill, f"as many numbers as mean, which is {self.mean!r}, or none")

    # ------------------------------------------------------------------------------------------------------------------
    # What it is made from

    @classmethod
    def of(cls, given: Any) -> Preprocessing:
        """The preprocessing that `given` stands for: see FORMS in from_libraries.py. Raises ValueError that lists them
        for anything else.
        """
        if isinstance(given, Preprocessing):
            return given
        found = fields_from(given)
        if found is None:
            raise ValueError(
                f"preprocessing={shortened(given)} is nothing that tells how images are prepared: give {FORMS}"
            )
        return cls._from_fields(found)

    @classmethod
    def from_json(cls, data: Any) -> Preprocessing:
        """What `to_json` gave. Raises ValueError where it cannot be that."""
        if not isinstance(data, Mapping):
            raise ValueError(f"preprocessing: {shortened(data)} is no mapping of {quoted(_NAMES)}")
        return cls._from_fields(data)

    @classmethod
    def _from_fields(cls, given: Mapping[str, Any]) -> Preprocessing:
        """Of a mapping with the names of the fields, whose tuples may be lists; a number for `crop` is of a square, and
        one for mean or std is of one channel.
        """
        for name in given:
            if name not in _NAMES:
                advice = did_you_mean(str(name), _NAMES)
                raise ValueError(f"preprocessing: {name!r} is none of its fields, which are {quoted(_NAMES)}{advice}")
        missing = [name for name in ("size", "crop", "mean", "std") if name not in given]
        if missing:
            raise ValueError(f"preprocessing: {quoted(missing)} is missing of {quoted(_NAMES)}")
        values = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in given.items()}
        if _is_length(values["crop"]):
            values["crop"] = (values["crop"], values["crop"])
        for name in ("mean", "std"):
            values[name] = (values[name],) if _is_finite(values[name]) else values[name]
        return cls(**{"interpolation": "bilinear", **values})

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def check_sizes(self, network: Network) -> None:
        """Raises ValueError, with what would be right, if the network cannot take what `apply` gives."""
        if len(network.graph.inputs) != 1 or len(network.graph.inputs[0].shape) != 4:
            raise ValueError("preprocessing is for a network that takes one tensor, of images [N, C, H, W]")
        _, channels, *size = network.graph.inputs[0].shape
        if channels not in (None, len(self.mean)):
            made = f"images of {len(self.mean)} channels, as many as its mean has numbers"
            raise ValueError(f"preprocessing makes {made}, and the network takes {channels}")
        made = self.output_size or (None, None)
        for name, fixed, own in zip(("height", "width"), size, made, strict=True):
            if fixed is not None and own != fixed:
                gives = "any" if own is None else own
                why = f" ({network.fixed})" if network.fixed else ""
                raise ValueError(
                    f"preprocessing makes images of {gives} {name}, and the network takes {fixed} only{why}: "
                    f"give crop={size}"
                )

    # ------------------------------------------------------------------------------------------------------------------
    # What it does

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of what `apply` makes of any image; None where that depends on the image."""
        return self.crop or (self.size if isinstance(self.size, tuple) and self.fit == "stretch" else None)

    def apply(self, image: Image) -> Tensor:
        """An image of Pillow as a float32 tensor [C, H, W]. The orientation that a camera has noted is not looked at
        here: images.py turns an image when it reads it.

        Bit for bit what torchvision's presets and timm's transforms give of the same image, converted by Pillow to the
        mode. Raises ValueError for pixels that have no range of brightness, and for an image so long and narrow that
        there is no memory for it after resizing.
        """
        image = self.resize(image)
        if self.crop is not None:
            image = self._cropped(image)
        return self._normalised(image)

    def resize(self, image: Image) -> Image:
        """The image in its mode and resized, which `apply` then crops and normalises. Raises ValueError as `apply`."""
        image = to_mode(image, CHANNELS[len(self.mean)])
        size = self.resized(*image.size)
        return image if size == image.size else image.resize(size, resampling(self.interpolation))

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of such an image after resizing. Raises ValueError if there is no memory for it then."""
        after = self._sides(width, height)
        if after[0] * after[1] > MOST_RESIZED:
            raise ValueError(f"{width} x {height} pixels would become {after[0]} x {after[1]} when resized")
        return after

    def _sides(self, width: int, height: int) -> tuple[int, int]:
        if self.size is None:
            return width, height
        if isinstance(self.size, int):
            longer = int(self.size * max(width, height) / min(width, height))  # torchvision's rounding
            return (self.size, longer) if width <= height else (longer, self.size)
        if self.fit == "stretch":
            return self.size[1], self.size[0]
        ratios = height / self.size[0], width / self.size[1]
        ratio = min(ratios) if self.fit == "cover" else max(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))  # timm's rounding

    def _cropped(self, image: Image) -> Image:
        """The middle of an image, surrounded by `fill` where it is smaller than the crop."""
        assert self.crop is not None
        height, width = self.crop
        fill = self.fill if len(self.fill) > 1 else sum(self.fill)  # a single number stands for all channels
        canvas = pillow().new(image.mode, (width, height), fill)
        canvas.paste(image, (_margin(width - image.width), _margin(height - image.height)))
        return canvas

    def _normalised(self, image: Image) -> Tensor:
        """By numpy: an image is small, and torch's threads would only disturb those that run a network beside this."""
        import numpy as np

        channels = np.array(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        x = channels.astype(np.float32, order="C")
        x /= 255
        x -= np.array(self.mean, np.float32).reshape(-1, 1, 1)
        x /= np.array(self.std, np.float32).reshape(-1, 1, 1)
        return torch.from_numpy(x)


_NAMES = tuple(field.name for field in fields(Preprocessing))


def _margin(free: int) -> int:
    """Pixels before the image on a canvas that has so many more; negative where the image is larger: torchvision rounds
    a half to an even number there.
    """
    return free // 2 if free > 0 else -round(-free / 2)


def _is_length(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_PIXELS


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_length, value))


def _is_finite(value: Any) -> bool:
    """Whether it is a number that float32 can hold."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= torch.finfo(torch.float32).max
    )


def _wrong(name: str, value: Any, right: str) -> ValueError:
    return ValueError(f"preprocessing: {name} is {shortened(value)}, and must be {right}")
