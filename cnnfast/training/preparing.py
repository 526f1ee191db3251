"""What a training needs of its data: the images that it learns from, those that are held out, and augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnnfast.nn as cnn

from .samples import DIGITS, ImageSet, class_weights, open_images, split

Data = str | Path | ImageSet
# Digits are as large as their images: they are moved by a pixel, turned and slanted a little, and never mirrored.
OF_DIGITS: dict[str, Any] = {
    "crop_scale": None, "padding": 1, "horizontal_flip_p": 0.0, "degrees": 10, "scale": (0.9, 1.1), "shear": 10,
    "resize_size": 8,
}  # fmt: skip
OF_GREY: dict[str, Any] = {"mean": 0.5, "std": 0.5}  # Augment's own are those of ImageNet's three colours


@dataclass(frozen=True)
class Selection:
    """Some images of a set."""

    images: ImageSet
    indices: Tensor


@dataclass(frozen=True)
class TrainingData:
    """held_out is None where nothing is."""

    training: Selection
    held_out: Selection | None
    augment: cnn.Augment

    @property
    def classes(self) -> tuple[str, ...]:
        return self.training.images.classes

    @property
    def labels(self) -> Tensor:
        """Of the images that are learnt from."""
        return self.training.images.labels[self.training.indices]

    def config(self) -> dict[str, Any]:
        """What is told of the data in a run's config."""
        return {
            "data": self.training.images.origin,
            "classes": list(self.classes),
            "counts": torch.bincount(self.labels, minlength=len(self.classes)).tolist(),
            "held_out": len(self.held_out.indices) if self.held_out else 0,
            "channels": self.training.images.channels,
            "size": list(self.augment.size),
            "augment": dict(self.augment.given),
        }


def named(data: float | Data) -> float | str:
    """As a config has it: a number or a path as it was given."""
    return str(data) if isinstance(data, str | Path) else data.origin if isinstance(data, ImageSet) else data


def prepare(
    data: Data,
    validation: float | Data,
    size: int | tuple[int, int] | None,
    options: Mapping[str, Any] | None,
    seed: int,
) -> TrainingData:
    """validation: the share of each class that is held out, 0 for nothing; or images of their own, of the same classes.
    size and options are cnn.Augment's, None the usual ones. Raises ValueError for data that cannot be trained with.
    """
    if size is None:
        size = 8 if data == DIGITS else data.size if isinstance(data, ImageSet) else 224
    images = data if isinstance(data, ImageSet) else open_images(data, size)
    usual = (OF_GREY if images.channels == 1 else {}) | (OF_DIGITS if images.origin == DIGITS else {})
    given = usual | dict(options or {})
    augment = cnn.Augment(size, **{"seed": seed, "num_classes": len(images.classes), **given})
    if isinstance(validation, float | int):
        if not 0 <= validation < 1:
            raise ValueError(f"validation is {validation}, and must be a share from 0 to below 1, or other data")
        indices, held_out = split(images, validation, seed) if validation else (torch.arange(len(images)), None)
        part = None if held_out is None else Selection(images, held_out)
    else:
        indices = torch.arange(len(images))
        others = validation if isinstance(validation, ImageSet) else _opened_alike(validation, size, images)
        part = Selection(others, torch.arange(len(others)))
    if part is not None:
        part = Selection(part.images.resized(augment.centre.resize), part.indices)
    return TrainingData(Selection(images, indices), part, augment)


def _opened_alike(path: str | Path, size: int | tuple[int, int], images: ImageSet) -> ImageSet:
    return open_images(path, size, classes=images.classes, channels=images.channels)


def weights_of_classes(given: Sequence[float] | str | None, labels: Tensor, classes: Sequence[str]) -> Tensor | None:
    """float32 [K] of numbers for each class or "balanced"; None of None. Raises ValueError for others."""
    if given is None:
        return None
    if given == "balanced":
        return class_weights(labels, len(classes))
    if isinstance(given, str):
        raise ValueError(f"class_weights {given!r} is neither 'balanced' nor a number for each class")
    weights = torch.tensor([float(weight) for weight in given])
    if len(weights) != len(classes) or not (weights >= 0).all() or not weights.isfinite().all():
        raise ValueError(f"class_weights are {len(weights)} numbers: give {len(classes)}, one of 0 or more a class")
    return weights
