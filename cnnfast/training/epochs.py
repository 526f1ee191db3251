"""All that is random in an epoch follows from (seed, epoch, rank): a run that was stopped goes on as if it had not
been.

Which images a batch has follows from the sampler, how they are augmented from each image's index. What is left are
dropout and its like, which draw from the generators of PyTorch, numpy and Python.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from lightning.pytorch.callbacks import Callback


def seed_of(seed: int, epoch: int, rank: int) -> int:
    """A number below 2**32, spread by numpy's SeedSequence, so that neighbours have nothing in common."""
    return int(numpy.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])


class EpochSeeds(Callback):
    """Seeds the generators at the first batch of each epoch: before it, loaders draw from them, in a first epoch
    earlier than in the others.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            number = seed_of(self.seed, trainer.current_epoch, trainer.global_rank)
            random.seed(number)
            numpy.random.seed(number)
            torch.manual_seed(number)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """The generators are afterwards as they were before."""
    states = random.getstate(), numpy.random.get_state()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
