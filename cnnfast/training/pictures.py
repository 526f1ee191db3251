"""A run in pictures: its curves, which classes are taken for which, its worst mistakes, and images as it saw them.

Each returns a picture as bytes of a PNG, so that a file is written aside and renamed as the others of a run are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..engine.images.images import resampling, to_mode
from ..nn.augment import Augment
from ..sheets import sheet, views
from .batches import collate
from .evaluating import Evaluation
from .runs import Epoch, best_of
from .samples import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

TRAINING, VALIDATION = "#1f6fb4", "#e08214"
MOST_NUMBERED = 20  # classes: with more the fields of the confusion matrix are too small for numbers
MOST_NAMED = 60  # classes: with more their names cannot be read beside it
LONGEST_NAME = 16  # letters
TILE = 160  # pixels of a side of an image among mistakes
AUGMENTED = 24


def curves(history: Sequence[Epoch]) -> bytes:
    """Loss and accuracy by the epoch, in training and on what was held out; the best epoch as a line."""
    figure, (losses, accuracies) = _figure(10, 4, 2)
    epochs = [epoch.epoch for epoch in history]
    for axes, name in ((losses, "loss"), (accuracies, "accuracy")):
        axes.plot(epochs, [getattr(epoch, name) for epoch in history], color=TRAINING, label="training")
        held_out = [getattr(epoch, f"validation_{name}") for epoch in history]
        if None not in held_out:
            axes.plot(epochs, held_out, color=VALIDATION, label="held out")
            axes.axvline(best_of(history).epoch, color="#b0b0b0", linestyle="--", label="best")
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    return _png(figure)


def confusion(evaluation: Evaluation) -> bytes:
    """A field for each class and each class that it was taken for: which share of the class was."""
    counts = evaluation.confusion.numpy()
    K = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.35 * K, 14)
    figure, (axes,) = _figure(side + 1, side, 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the class")
    if K <= MOST_NAMED:
        names = [_short(name) for name in evaluation.classes]
        axes.set_xticks(range(K), names, rotation=90, fontsize=8)
        axes.set_yticks(range(K), names, fontsize=8)
    if K <= MOST_NUMBERED:
        for row in range(K):
            for column in np.flatnonzero(counts[row]):
                ink = "white" if shares[row, column] > 0.5 else "#303030"
                axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.spines[:].set_visible(True)
    axes.set_title(f"{evaluation.right:,} of {evaluation.images:,} right", fontsize=10)
    return _png(figure)


def mistakes(evaluation: Evaluation, images: ImageSet) -> bytes | None:
    """The worst mistakes, each with its class and what it was taken for; None without any."""
    found = evaluation.mistakes
    if not found:
        return None
    names = evaluation.classes
    captions = [
        f"{names[m.label]} ({m.of_label:.1%}), taken for {names[m.taken_for]} ({m.probability:.1%})\n"
        f"{images.name(m.index).replace(chr(92), '/').rpartition('/')[2]}"
        for m in found
    ]
    tiles = torch.stack([_tile(images.picture(m.index)) for m in found])
    return _as_png(sheet(tiles, captions, headline="The worst mistakes"))


def augmented(augment: Augment, images: ImageSet, indices: Sequence[int]) -> bytes:
    """Some images as the network sees them in the first epoch, with what was drawn for each."""
    batch = collate([images[i] for i in list(indices)[:AUGMENTED]])
    mode = augment.training
    augment.train()
    try:
        seen: Any = augment(batch.images, index=batch.index)
        draws = augment.draw(_sizes(batch.images), batch.index, 0)
    finally:
        augment.train(mode)
    C = seen.shape[1]
    mean, std = (torch.tensor(numbers * (C // len(numbers))).view(-1, 1, 1) for numbers in (augment.mean, augment.std))
    pixels = seen.float() * std + mean
    told = views(draws, [(int(h), int(w)) for h, w in _sizes(batch.images).tolist()], augment.size)
    return _as_png(sheet(pixels, [view.caption for view in told], headline="Images as the network sees them"))


def _sizes(images: Any) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        return torch.tensor(images.shape[1:3]).expand(len(images), 2)
    return images[2]


def _tile(image: Image) -> torch.Tensor:
    """The middle of an image, [3, TILE, TILE] in [0, 1]; the pixels of a small one become squares."""
    from PIL import ImageOps

    how = resampling("nearest" if max(image.size) < TILE else "bilinear")
    fitted = ImageOps.fit(to_mode(image, "RGB"), (TILE, TILE), how)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255


def _figure(width: float, height: float, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, format="png")
    return stream.getvalue()


def _as_png(picture: Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()
