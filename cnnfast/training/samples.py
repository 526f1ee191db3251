"""Labelled images: a folder of class folders, a CSV, or the digits, as a Dataset of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..engine.images.preprocessing import Preprocessing
from .csv_files import list_csv
from .folders import list_folder
from .listing import Listing, note, quoted_few, refuse_unknown
from .orders import PARTS, shuffled
from .reading import ImageFiles, SampleSource, as_tensor, digits, read_for_training

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS = "digits"
CSV = (".csv", ".tsv", ".txt")


class Sample(NamedTuple):
    """image: uint8 [H, W, C]. label: of its class. index: of the image in its set."""

    image: Tensor
    label: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class UnreadableSample(ValueError):
    """Image `number` of a set cannot be read. The message names its file and the reason."""

    def __init__(self, number: int, file: str, reason: str) -> None:
        super().__init__(number, file, reason)  # as its arguments: another process makes it from them again
        self.number, self.file, self.reason = number, file, reason

    def __str__(self) -> str:
        return f"{self.file} cannot be read: {self.reason}"


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[Sample]):
    """Labelled images, which are read when they are asked for. Small to send to another process.

    classes: their names. labels: int64 [N], indices into them. channels: 1 or 3, of every image. size: pixels of a side
    of what augmentation makes of an image. notes: sentences about what was unusual in the data. evaluation: how images
    are resized for evaluation (`resized`), or None: as for training.
    """

    source: SampleSource
    labels: Tensor
    classes: tuple[str, ...]
    channels: int
    size: int
    notes: tuple[str, ...] = ()
    evaluation: Preprocessing | None = None
    origin: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Sample:
        """Image i, upright. For training it is at most twice as large as `size`, on its shorter side, and never made
        smaller than `size`, so that a bilinear map of it onto `size` pixels passes over none of them.

        Raises UnreadableSample.
        """
        i = range(len(self))[i]
        with self._named(i):
            if self.evaluation is None:
                image = read_for_training(self.source, i, self.channels, self.size)
            else:
                image = as_tensor(self.evaluation.resize(self.source.read(i, None)))
            return Sample(image, int(self.labels[i]), i)

    def picture(self, i: int) -> Image:
        """Image i as Pillow reads it, upright and as large as it is. Raises UnreadableSample."""
        with self._named(i):
            return self.source.read(i, None)

    def look(self, i: int) -> tuple[int, int]:
        """(width, height) of image i in its file, whose pixels are not read. Raises UnreadableSample where the header
        of the file tells that they cannot be.
        """
        with self._named(i):
            size = self.source.look(i)
            if self.evaluation is not None:
                self.evaluation.resized(*size)
            return size

    @contextmanager
    def _named(self, i: int) -> Iterator[None]:
        """What is wrong with image i becomes an UnreadableSample."""
        try:
            yield
        except ValueError as error:
            raise UnreadableSample(i, self.name(i), str(error)) from None
        except MemoryError:
            raise UnreadableSample(i, self.name(i), "there is not enough memory for it") from None

    def name(self, i: int) -> str:
        """What a user calls image i: its file."""
        return self.source.name(i)

    def resized(self, shorter: int) -> ImageSet:
        """The same images for evaluation: of each the shorter side has so many pixels, and its pixels are those that a
        frozen network sees whose preprocessing has size=shorter and interpolation="bilinear", before they are cropped.
        """
        zeros, ones = (0.0,) * self.channels, (1.0,) * self.channels
        return replace(self, evaluation=Preprocessing(shorter, None, "bilinear", zeros, ones))

    def only(self, classes: Sequence[str]) -> ImageSet:
        """The images of these classes, whose labels are now their places in `classes`. Raises ValueError for a class
        that is not there.
        """
        missing = [name for name in classes if name not in self.classes]
        if missing or not 2 <= len(set(classes)) == len(classes):
            names = quoted_few(self.classes)
            raise ValueError(f"classes is {tuple(classes)!r}, and must be two or more different ones of {names}")
        place = torch.full((len(self.classes),), -1)
        place[[self.classes.index(name) for name in classes]] = torch.arange(len(classes))
        labels = place[self.labels]
        return replace(self, labels=labels, classes=tuple(classes)).taken(torch.nonzero(labels >= 0).flatten())

    def taken(self, indices: Tensor) -> ImageSet:
        """These images only, int64 [n], in this order."""
        return replace(self, source=self.source.taken(indices), labels=self.labels[indices])


def open_images(
    data: str | Path,
    size: int | tuple[int, int],
    *,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
) -> ImageSet:
    """The labelled images of a folder with a folder for each class, or of a CSV with the columns file and label: see
    list_folder and list_csv. If `data` is the text "digits", scikit-learn's handwritten digits; "./digits" is a folder.

    size: pixels of a side of what augmentation makes of an image, or (height, width), of which the larger counts.
    classes: the names of the classes in the order of a trained network's outputs; without them the data's own.
    channels: 3 or 1, of every image; without it 3 for files, and 1 for the digits, which are grey.

    Raises ValueError, or FileNotFoundError if there is nothing called `data`, and ModuleNotFoundError where Pillow or
    scikit-learn is missing.
    """
    sides = size if isinstance(size, tuple) else (size, size)
    if not all(type(side) is int and side >= 1 for side in sides) or len(sides) != 2:
        raise ValueError(f"size is {size!r}, and must be a number of pixels or (height, width), of 1 or more")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels!r}, and must be 1 (grey) or 3 (red, green, blue)")
    if data == DIGITS:
        held, labels = digits()
        whole = ImageSet(held, labels, tuple(map(str, range(10))), channels or 1, max(sides), origin=DIGITS)
        return whole if classes is None else _labelled_as(whole, classes)
    listing = _listing(Path(data), classes)
    source = ImageFiles.of(listing.folder, listing.names)
    labels = torch.tensor(listing.labels, dtype=torch.int64)
    counts = labels.bincount(minlength=len(listing.classes))
    single = [name for name, count in zip(listing.classes, counts.tolist(), strict=True) if count == 1]
    rest = f"a single image, which is not held out for validation: {quoted_few(single)}"
    notes = filter(None, [*listing.notes, note(len(single), "class has", "classes have", rest)])
    return ImageSet(source, labels, listing.classes, channels or 3, max(sides), tuple(notes), origin=str(data))


def _listing(path: Path, classes: Sequence[str] | None) -> Listing:
    if path.is_dir():
        return list_folder(path, classes)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder and no CSV {path}; '{DIGITS}' stands for scikit-learn's digits")
    if path.suffix.lower() not in CSV:
        raise ValueError(f"{path} is neither a folder nor a CSV, whose name ends in {', '.join(CSV)}")
    return list_csv(path, classes)


def _labelled_as(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    refuse_unknown(images.classes, classes, DIGITS)
    place = torch.tensor([classes.index(name) for name in images.classes])
    return replace(images, labels=place[images.labels], classes=tuple(classes))


def split(images: ImageSet, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training indices, validation indices), int64, ascending: of each class the same fraction is for validation, to
    the nearest image, and at least one image is on either side. A class with a single image is in training only.

    The same images and seed are split alike on every machine. Raises ValueError if the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction for validation is {fraction}, and must be between 0 and 1")
    training, validation = [], []
    for label in range(len(images.classes)):
        own = torch.nonzero(images.labels == label).flatten()
        own = own[shuffled(len(own), seed, PARTS, label)]
        count = math.floor(len(own) * fraction + 0.5)
        count = min(max(count, 1), len(own) - 1) if len(own) > 1 else 0
        validation.append(own[:count])
        training.append(own[count:])
    return torch.cat(training).sort().values, torch.cat(validation).sort().values


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """float32 [classes]: in inverse proportion to how many of the labels int64 [N] are of a class, with a mean of 1. A
    class without any weighs 0, and is not counted in the mean.
    """
    counts = torch.bincount(labels, minlength=classes).double()
    weights = torch.where(counts > 0, 1 / counts, 0.0)
    return (weights * (counts > 0).sum() / weights.sum()).float()
