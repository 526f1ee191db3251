"""The network of a run's folder, for evaluating it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..conversion import convert
from ..nn.augment import Augment
from ..targets.target import TargetError
from .runs import load_best, read_config
from .starting import start


@dataclass(frozen=True)
class Trained:
    """model: in eval, converted, with the weights that validated best. augment: how images were prepared for it.
    channels: of its images.
    """

    model: nn.Module
    augment: Augment
    classes: tuple[str, ...]
    channels: int


def read_run(folder: str | Path) -> Trained:
    """The network of a run, built by the name that its config has. Raises ValueError for a folder that is no run's, or
    has no weights yet, and TargetError, which is one too, for a network that has no such name.
    """
    folder = Path(folder)
    config = read_config(folder)
    data, name = config["data"], config["options"]["model"]
    size, classes = tuple(data["size"]), tuple(data["classes"])
    try:
        started = start(name, len(classes), size, channels=data["channels"])
    except TargetError as error:
        raise TargetError(f"the network {name} of the run in {folder} cannot be built here: {error}") from None
    try:
        load_best(started.model, folder)
    except FileNotFoundError:
        raise ValueError(f"the run in {folder} has no weights yet: its first epoch is not over") from None
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in data["augment"].items()
        if key not in ("size", "generator")
    }
    return Trained(convert(started.model.eval(), inplace=True), Augment(size, **options), classes, data["channels"])
