"""Classes of image files, by a frozen network: threads read and prepare images while batches run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..structures import LEAF, Structure
from .images import read
from .preprocessing import Preprocessing

S = TypeVar("S")
T = TypeVar("T")
# A class and its probability; the most probable first.
Top = tuple[tuple[int, float], ...]
# An image that was prepared, or why it cannot be had.
Prepared = tuple[Path, Tensor | str]
# How far the sum of a row may be from 1 if it holds probabilities, which half precision rounds.
SUMS_TO_ONE = 0.01
READERS = 4  # threads: a photograph of 12 megapixels takes longer to read than a small network to run
NOT_FINITE = "the network gives no finite numbers for it"


@dataclass(frozen=True)
class Prediction:
    """top: empty if there is an error, a sentence that says why the image has no prediction."""

    file: Path
    top: Top = ()
    error: str = ""


class NoClasses(ValueError):
    """The result of a network does not tell classes; the message says what it is."""


class OtherClasses(ValueError):
    """The result of a network tells another number of classes than there are names."""


def predict(
    network: Callable[[Tensor], Any],
    preprocessing: Preprocessing,
    files: Sequence[Path],
    *,
    batch: int,
    top: int,
    classes: int | None = None,
) -> Generator[list[Prediction], None, None]:
    """The predictions for a batch of files, and then for the next one, in the order of the files: for each the `top`
    most probable classes, or all of them if there are fewer. An image that cannot be read takes no part in a batch.

    network: called with images [n, C, H, W], n <= batch, all of one size. Images of different sizes, which there may be
    where the preprocessing does not crop, are in different batches; a size that the network refuses is the error of
    these images. classes: how many the network should have, if that is known. A few batches of images are in memory,
    however many files there are.

    Raises NoClasses if the result is not one tensor [n, classes], OtherClasses if it has another number of them.
    """

    def prepared(file: Path) -> Prepared:
        try:
            return file, preprocessing.apply(read(file))
        except (ValueError, OSError) as error:
            return file, str(error)
        except MemoryError:
            return file, "there is not enough memory for it"

    with closing(ahead(prepared, files, 2 * batch)) as reader:
        for group in _batches(reader, batch):
            images = [image for _, image in group if isinstance(image, Tensor)]
            found = iter(_classify(network, torch.stack(images), top, classes) if images else ())
            told = [(file, image if isinstance(image, str) else next(found)) for file, image in group]
            yield [Prediction(f, error=one) if isinstance(one, str) else Prediction(f, one) for f, one in told]


# ----------------------------------------------------------------------------------------------------------------------
# Images


def ahead(function: Callable[[S], T], items: Iterable[S], most: int) -> Generator[T, None, None]:
    """function(item) of each item in their order, by threads that are at most so many items ahead."""
    pool = ThreadPoolExecutor(READERS)
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(prepared: Iterable[Prepared], batch: int) -> Iterator[list[Prepared]]:
    """Neighbours, with at most so many images, all of one size, and what cannot be had between them."""
    group: list[Prepared] = []
    shape, count = None, 0
    for file, image in prepared:
        if isinstance(image, Tensor):
            if count == batch or (count and image.shape != shape):
                yield group
                group, count = [], 0
            shape, count = image.shape, count + 1
        group.append((file, image))
        if len(group) == 2 * batch:  # where few can be had, the others are told in time too
            yield group
            group, count = [], 0
    if group:
        yield group


# ----------------------------------------------------------------------------------------------------------------------
# Classes


def _classify(network: Callable[[Tensor], Any], images: Tensor, top: int, classes: int | None) -> list[Top | str]:
    """For each image its most probable classes, or why there are none."""
    try:
        leaves, structure = Structure.flatten(network(images))
    except (ValueError, RuntimeError) as error:  # a size that it does not take, or has no memory for
        return [str(error)] * len(images)
    if structure.count != 1 or leaves[0].dim() != 2 or len(leaves[0]) != len(images) or leaves[0].shape[1] < 2:
        kind = "a tensor" if structure.kind == LEAF else f"a {structure.kind}"
        shapes = " and ".join("x".join(map(str, ["N", *t.shape[1:]])) for t in leaves)
        raise NoClasses(f"its result is {kind} of {shapes}, and classes are read from one tensor of N x classes")
    scores = leaves[0].double()
    if classes is not None and scores.shape[1] != classes:
        raise OtherClasses(f"these are names of {classes} classes, and the network tells {scores.shape[1]}")
    values, indices = probabilities(scores).topk(min(top, scores.shape[1]))
    return [
        tuple(zip(index.tolist(), value.tolist(), strict=True)) if value.isfinite().all() else NOT_FINITE
        for index, value in zip(indices, values, strict=True)
    ]


def probabilities(scores: Tensor) -> Tensor:
    """The softmax of each row of scores [N, classes], or, if every row is one of probabilities already, the scores."""
    are_probabilities = (scores >= 0).all() and ((scores.sum(1) - 1).abs() < SUMS_TO_ONE).all()
    return scores if are_probabilities else scores.softmax(1)
