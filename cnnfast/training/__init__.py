"""Trains networks on images: `fit`, and the lightning module that it trains with.

    run = cnnfast.training.fit(model, "photos/", out="run")

lightning imports torchvision, through torchmetrics, also where only half of torchvision loads: hence the first call
below, which comes before anything here imports lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..torchvision_import import make_importable

if TYPE_CHECKING:
    from .batches import loader as loader
    from .evaluating import evaluate as evaluate
    from .fitting import fit as fit
    from .interrupts import Interrupted as Interrupted
    from .losses import Diverged as Diverged
    from .module import Module as Module
    from .runs import Run as Run
    from .samples import open_images as open_images
    from .starting import start as start
    from .trained import read_run as read_run

make_importable()

_HOME = {
    "Diverged": ".losses",
    "Interrupted": ".interrupts",
    "Module": ".module",
    "Run": ".runs",
    "evaluate": ".evaluating",
    "fit": ".fitting",
    "loader": ".batches",
    "open_images": ".samples",
    "read_run": ".trained",
    "start": ".starting",
}
__all__ = ["Diverged", "Interrupted", "Module", "Run", "evaluate", "fit", "loader", "open_images", "read_run", "start"]

if not TYPE_CHECKING:  # a type checker would take every name, misspelt ones too, for one that this finds

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(_HOME[name], __name__), name)
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", "torchmetrics"):
                raise
            text = f'{error.name}, which trains networks here, is not installed: pip install ".[train]" brings it'
            raise ModuleNotFoundError(text, name=error.name) from None


def __dir__() -> list[str]:
    return sorted(__all__)
