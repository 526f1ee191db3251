"""The loss of a batch, and what happens where it is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SHOWN = 8  # images of a batch that a message names


class Diverged(FloatingPointError):
    """A loss or a weight is NaN or infinite: training on would only spread it."""


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """The mean over images of the cross-entropy of `logits` [N, K] and `labels`, int [N] or the share of each class
    [N, K]; a scalar.

    Labels are smoothed first (Szegedy et al. 2016, section 7): a share of `smoothing` is spread over all classes, and
    each class then counts `weights` [K] times. Sums are divided by N, whatever the weights, as PyTorch does where
    labels are shares: so labels that are numbers and labels that are shares give the same loss, and the mean over
    processes with batches of equal size is that of the whole batch.
    """
    total = functional.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
    return total / len(logits)


class BatchPlace(NamedTuple):
    """Which batch a loss is of; `images` are the indices of its images [N], on the CPU."""

    epoch: int
    batch: int
    images: Tensor


class LossWatch:
    """Raises Diverged for a loss that is NaN or infinite, and names its batch.

    On a GPU the host must not wait for each loss: whether it is finite is copied to it meanwhile, and read when the
    next loss comes, at the latest when the epoch ends. No state is saved before that.
    """

    def __init__(self, name_of: Callable[[int], str] | None = None) -> None:
        self.name_of = name_of
        self._pending: tuple[Tensor, torch.cuda.Event | None, BatchPlace] | None = None

    def __deepcopy__(self, memo: object) -> LossWatch:
        """The copy of a module whose weights are averages trains nothing, and needs no names."""
        return LossWatch()

    def note(self, loss: Tensor, step: BatchPlace) -> None:
        self.settle()
        value = loss.detach()
        if value.is_cuda:
            there = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._pending = (there, copied, step)
        else:
            self._pending = (value, None, step)
            self.settle()

    def settle(self) -> None:
        """Waits for what was noted last. Raises Diverged."""
        if self._pending is None:
            return
        loss, copied, step = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(loss.item()):
            raise Diverged(
                f"the loss is {loss.item()} in epoch {step.epoch + 1}, batch {step.batch + 1}, of "
                f"{self._named(step.images.tolist())}: look at these images, take a smaller learning rate, or clip "
                "gradients"
            )

    def _named(self, images: Sequence[int]) -> str:
        names = [self.name_of(i) if self.name_of else f"image {i}" for i in images[:SHOWN]]
        more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
        return ", ".join(names) + more
