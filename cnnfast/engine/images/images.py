"""Image files: which files are images, reading them, and bringing their pixels into a mode that has a channel for each
mean. Pillow is imported when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

NO_PILLOW = 'images are read by Pillow, which is not installed: pip install ".[images]"'
# The mode of an image that has so many channels.
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# What Pillow knows and cannot draw by itself: scientific data, films, and drawings for which it starts Ghostscript.
NO_PHOTOGRAPHS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class UnreadableImage(ValueError):
    """An image file that cannot be used; the message is the reason, without the file."""


def pillow() -> ModuleType:
    """PIL.Image, which knows all formats. Raises ModuleNotFoundError, which says how to install it."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError(NO_PILLOW, name="PIL") from None
    Image.init()
    return Image


def resampling(interpolation: str) -> Resampling:
    """Pillow's filter of this name, such as "bicubic"."""
    return pillow().Resampling[interpolation.upper()]


# ----------------------------------------------------------------------------------------------------------------------
# Finding


@dataclass(frozen=True)
class Found:
    """files: what to read, in order. unreadable: folders that cannot be looked into, with the reason. others: how many
    files of folders are no images, by their extension. hidden: files and folders that are left out for a dot before
    their name.
    """

    files: list[Path] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    hidden: list[Path] = field(default_factory=list)


def find(places: Sequence[Path]) -> Found:
    """The files among `places`, and the images in its folders and in their folders, by name. In a folder a file is an
    image if its extension is one that Pillow reads, and what is hidden, with a dot before its name, is left out.
    Links are followed, and no folder is visited twice.

    Raises FileNotFoundError for a place that is neither a file nor a folder.
    """
    extensions = _extensions()
    found = Found()
    for place in places:
        if place.is_file():
            found.files.append(place)
        elif place.is_dir():
            for file in _files_below(place, found):
                if file.suffix.lower() in extensions:
                    found.files.append(file)
                else:
                    found.others[file.suffix.lower()] = found.others.get(file.suffix.lower(), 0) + 1
        else:
            raise FileNotFoundError(f"there is no file or folder {place}")
    return found


def _extensions() -> set[str]:
    image = pillow()
    readable = image.OPEN.keys() - NO_PHOTOGRAPHS | {"MPO"}  # which JPEG's reader opens
    return {extension for extension, name in image.registered_extensions().items() if name in readable}


def _files_below(folder: Path, found: Found) -> Iterator[Path]:
    def remember(error: OSError) -> None:
        found.unreadable[Path(error.filename)] = error.strerror or str(error)

    visited = set()
    for here, folders, files in os.walk(folder, onerror=remember, followlinks=True):
        place = os.stat(here)
        if (place.st_dev, place.st_ino) in visited:  # a link to a folder above it
            folders.clear()
            continue
        visited.add((place.st_dev, place.st_ino))
        found.hidden.extend(Path(here, name) for name in folders + files if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read(file: Path, *, at_least: int | None = None) -> Image:
    """The image in a file, turned upright as the camera noted in its EXIF data; of several pictures the first. Raises
    UnreadableImage.

    at_least: how many pixels of the shorter side suffice. A JPEG is then decoded at a half, a quarter or an eighth of
    its size, the least that leaves so many; this takes a part of the time, and each pixel is the mean of those that it
    stands for. Other formats cannot be decoded in part.
    """
    with _opened(file) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        from PIL import ImageOps

        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # what a broken note raises is not always a class of its own
            return image.copy()


def look(file: Path) -> tuple[int, int]:
    """(width, height) of the image in a file, by its header alone: its pixels are not read, and may be missing. Raises
    UnreadableImage where the header tells that `read` or `to_mode` will.
    """
    with _opened(file) as image:
        size, mode = image.size, image.mode
    if mode == "F":
        raise UnreadableImage(_no_white(mode))
    return size


@contextmanager
def _opened(file: Path) -> Iterator[Image]:
    """What goes wrong with the image while it is open becomes an UnreadableImage."""
    images = pillow()
    if file.exists() and not file.is_file():
        raise UnreadableImage("it is no file, but a folder, a pipe or a device")  # which may never end
    try:
        with images.open(file, formats=[name for name in images.ID if name not in NO_PHOTOGRAPHS]) as image:
            yield image
    except images.DecompressionBombError as error:
        raise UnreadableImage(str(error)) from None
    except images.UnidentifiedImageError:
        empty = file.stat().st_size == 0
        raise UnreadableImage("the file is empty" if empty else "Pillow knows no image format like this") from None
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None
    except Exception as error:  # readers of broken files raise whatever their parsing meets
        raise UnreadableImage(f"{type(error).__name__}: {error}") from None


def to_mode(image: Image, mode: str) -> Image:
    """The image in this mode of 8 bits a channel. Pixels of 16 bits, which Pillow would cut off at 255, are scaled, so
    that white stays white. Otherwise by Pillow, as torchvision's loaders do it: transparency is forgotten, and colours
    become grey by their weights of ITU-R 601-2.

    Raises UnreadableImage for pixels whose white is not known.
    """
    if image.mode == mode:
        return image
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(image)):
        raise UnreadableImage(_no_white(image.mode))
    if image.mode[0] == "I":
        import numpy as np

        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # rounded to nearest: 65535 = 255 * 257
        image = pillow().fromarray(grey.astype(np.uint8))
    try:
        return image.convert(mode)
    except ValueError as error:
        raise UnreadableImage(str(error)) from None


def _no_white(mode: str) -> str:
    return f'pixels of 32 bits (mode "{mode}") do not tell what white is: save it with 16 bits, or 8'


def _has_16_bits(image: Image) -> bool:
    """Whether pixels of a type of 32 bits, as which Pillow reads some files of 16, need only 16."""
    lowest, highest = image.getextrema()
    return 0 <= lowest and highest < 2**16  # type: ignore[operator]
