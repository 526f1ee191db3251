"""What a run's folder gets when the training is over: what the best weights are worth on what was held out, pictures,
and the frozen network.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..engine import freeze
from ..engine.images.preprocessing import Preprocessing
from ..nn.augment import Augment
from . import pictures
from .evaluating import Evaluation, evaluate
from .preparing import TrainingData
from .progress import AsFarAs
from .ranks import is_first
from .runs import Run
from .saving import write

FROZEN, EVALUATION = "model.cnnfast", "evaluation.json"
CURVES, CONFUSION, MISTAKES, AUGMENTED = "curves.png", "confusion.png", "mistakes.png", "augmented.png"


def finish(
    run: Run,
    data: TrainingData,
    *,
    batch: int = 64,
    workers: int = 0,
    step: AsFarAs = lambda done, total, text="": None,
) -> Evaluation | None:
    """Writes into the folder of a run evaluation.json, curves.png, confusion.png, mistakes.png, augmented.png and
    model.cnnfast, each as a whole, and returns what was found on the images that were held out; None where none were.

    Where several processes train, all of them call this: each evaluates its share, and the first one writes. step: told
    how far this is. Raises OSError where a file cannot be written.
    """
    assert run.folder is not None
    folder, found = run.folder, None
    images = data.training.images
    if data.held_out is not None:
        held = data.held_out
        found = evaluate(run.model, data.augment, held.images, held.indices, batch=batch, workers=workers, tell=step)
    if not is_first():
        return found
    step(0, None, "drawing")
    if data.held_out is not None and found is not None:
        write(folder / EVALUATION, (json.dumps(found.to_json(), indent=1) + "\n").encode())
        write(folder / CONFUSION, pictures.confusion(found))
        if (worst := pictures.mistakes(found, data.held_out.images)) is not None:
            write(folder / MISTAKES, worst)
    write(folder / CURVES, pictures.curves(run.history))
    write(folder / AUGMENTED, pictures.augmented(data.augment, images, data.training.indices.tolist()))
    step(0, None, "freezing")
    _freeze(run, data.augment, images.channels, folder / FROZEN)
    return found


def as_frozen(augment: Augment, channels: int) -> Preprocessing:
    """How a frozen network prepares images: as `augment` does in evaluation."""
    mean, std = (tuple(map(float, numbers * (channels // len(numbers)))) for numbers in (augment.mean, augment.std))
    return Preprocessing(augment.centre.resize, augment.size, "bilinear", mean, std)


def _freeze(run: Run, augment: Augment, channels: int, file: Path) -> None:
    device = next(run.model.parameters()).device
    example = torch.zeros(1, channels, *augment.size)
    model = run.model.to("cpu")
    try:
        frozen = freeze(model, example, preprocessing=as_frozen(augment, channels), classes=run.classes)
    finally:
        model.to(device)
    frozen.save(file)  # which replaces it as a whole
