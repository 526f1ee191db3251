"""How well a network tells classes apart on labelled images: which it takes for which, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cnnfast.nn as cnn

from ..engine.images.predicting import ahead, probabilities
from ..engine.images.preprocessing import Preprocessing
from .batches import loader
from .samples import ImageSet

TOP = 5
MISTAKES = 24


class Probabilities(NamedTuple):
    """What a network says of some images: their index int64 [n], and how probable it takes each class, [n, K]."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    probabilities: Tensor


class Mistake(NamedTuple):
    """An image, by its index in its set, that was taken for the class `taken_for` with so much probability, and what
    was left for its own, `label`.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    label: int
    taken_for: int
    probability: float
    of_label: float


class ClassScore(NamedTuple):
    """Of a class: how many images there are of it, which share of them was recognised, and which share of those that
    were taken for it are of it. None where there are none.
    """

    name: str
    images: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    confusion: int64 [K, K], how many images of the class of a row were taken for that of a column. in_top: how many
    have their class among the five most probable ones, or among all if there are fewer. mistakes: the worst of them,
    those first whose own class was given the least probability.
    """

    classes: tuple[str, ...]
    confusion: Tensor
    in_top: int
    mistakes: tuple[Mistake, ...]

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """The share of the images whose most probable class is theirs."""
        return self.right / self.images

    @property
    def top(self) -> float:
        """The share of the images that have their class among the five most probable ones."""
        return self.in_top / self.images

    @property
    def scores(self) -> list[ClassScore]:
        """A line for each class, in their order."""
        own, taken = self.confusion.sum(1).tolist(), self.confusion.sum(0).tolist()
        right = self.confusion.diagonal().tolist()
        return [
            ClassScore(name, n, r / n if n else None, r / t if t else None)
            for name, n, t, r in zip(self.classes, own, taken, right, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data: accuracy, top_five, images, a list `classes` with the scores, and `confusion` as rows."""
        return {
            "accuracy": self.accuracy,
            "top_five": self.top,
            "images": self.images,
            "classes": [score._asdict() for score in self.scores],
            "confusion": self.confusion.tolist(),
        }


def evaluate(
    model: nn.Module,
    augment: cnn.Augment,
    images: ImageSet,
    indices: Tensor | None = None,
    *,
    batch: int = 64,
    workers: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """How well `model` does on images of a set, int64 `indices` or all, in eval and as `augment` prepares them there.

    It runs on the device of its parameters, and in their dtype; the modes of both are afterwards what they were. tell:
    called with how many images are done, and of how many. Raises samples.UnreadableSample for an image that cannot be
    read, ValueError where there is no image, or where the model has another number of classes.
    """
    indices = _some(images, indices)
    images = images.resized(augment.centre.resize)
    loading = loader(images, indices, batch=batch, seed=0, shuffle=False, workers=workers, pin=False)
    return judged(images, indices, _by_model(model, augment, loading), tell)


def evaluate_frozen(
    network: Callable[[Tensor], Any],
    preprocessing: Preprocessing,
    images: ImageSet,
    indices: Tensor | None = None,
    *,
    batch: int = 64,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """The same of a frozen network, whose own preprocessing prepares the images."""
    indices = _some(images, indices)
    return judged(images, indices, _by_frozen(network, preprocessing, images, indices, batch), tell)


def _some(images: ImageSet, indices: Tensor | None) -> Tensor:
    indices = torch.arange(len(images)) if indices is None else indices
    if not len(indices):
        raise ValueError("there is no image to evaluate")
    return indices


def _by_model(model: nn.Module, augment: cnn.Augment, batches: Iterable[Any]) -> Iterator[Probabilities]:
    modes = [(module, module.training) for module in (*model.modules(), augment)]
    first = next(model.parameters(), None)
    device, dtype = (torch.device("cpu"), None) if first is None else (first.device, first.dtype)
    model.eval()
    augment.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                pixels = augment(batch.to(device).images).to(dtype)
                yield Probabilities(batch.index, model(pixels).double().softmax(1).cpu())
    finally:
        for module, mode in modes:
            module.training = mode


def _by_frozen(
    network: Callable[[Tensor], Any], preprocessing: Preprocessing, images: ImageSet, indices: Tensor, batch: int
) -> Iterator[Probabilities]:
    def prepared(i: int) -> Tensor:
        return preprocessing.apply(images.picture(i))

    reader = ahead(prepared, indices.tolist(), 2 * batch)
    for some in indices.split(batch):
        scores: Any = network(torch.stack([next(reader) for _ in some]))
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            raise ValueError("the network returns no tensor [N, classes], from which classes could be read")
        yield Probabilities(some, probabilities(scores.double()))


def judged(
    images: ImageSet,
    indices: Tensor,
    said: Iterable[Probabilities],
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """The evaluation of what a network says of these images, batch by batch. Raises ValueError where it tells another
    number of classes than the images have, or gives no finite numbers for an image.
    """
    K = len(images.classes)
    confusion, in_top, done = torch.zeros(K * K, dtype=torch.int64), 0, 0
    mistakes: list[Mistake] = []
    for index, p in said:
        if p.shape[1] != K:
            raise ValueError(f"the network tells {p.shape[1]} classes apart, and the images are of {K}")
        if not p.isfinite().all():
            broken = index[~p.isfinite().all(1)][0]
            raise ValueError(f"the network gives no finite numbers for {images.name(int(broken))}")
        labels = images.labels[index]
        best, taken = p.max(1)
        own = p.gather(1, labels[:, None]).squeeze(1)
        confusion += torch.bincount(labels * K + taken, minlength=K * K)
        in_top += int((p.topk(min(TOP, K), 1).indices == labels[:, None]).sum())
        wrong = torch.nonzero(taken != labels).flatten()
        columns = [t[wrong].tolist() for t in (index, labels, taken, best, own)]
        mistakes = sorted([*mistakes, *map(Mistake._make, zip(*columns, strict=True))], key=_badness)[:MISTAKES]
        done += len(index)
        tell(done, len(indices))
    confusion, in_top, mistakes = _together(confusion, in_top, mistakes)
    return Evaluation(images.classes, confusion.view(K, K), in_top, tuple(mistakes))


def _together(confusion: Tensor, in_top: int, mistakes: list[Mistake]) -> tuple[Tensor, int, list[Mistake]]:
    """What the processes found, each of its own images, as one; the same in each of them."""
    if not dist.is_available() or not dist.is_initialized():
        return confusion, in_top, mistakes
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (confusion, in_top, mistakes))
    everyone = sorted((mistake for *_, own in found for mistake in own), key=_badness)
    return torch.stack([one for one, *_ in found]).sum(0), sum(n for _, n, _ in found), everyone[:MISTAKES]


def _badness(mistake: Mistake) -> tuple[float, float, int]:
    return mistake.of_label, -mistake.probability, mistake.index


def most_confused(evaluation: Evaluation, most: int = 5) -> Sequence[tuple[str, str, int]]:
    """(class, what it was taken for, how often) of the commonest confusions, the commonest first."""
    off = evaluation.confusion.clone().fill_diagonal_(0)
    counts, places = (t[:most] for t in off.flatten().sort(descending=True, stable=True))
    K = len(evaluation.classes)
    return [
        (evaluation.classes[place // K], evaluation.classes[place % K], count)
        for count, place in zip(counts.tolist(), places.tolist(), strict=True)
        if count
    ]
