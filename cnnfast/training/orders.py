"""Orders that follow from a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# What an order is for: of one seed each use has orders of its own.
EPOCHS, PARTS = 0, 1


def shuffled(count: int, seed: int, use: int, number: int) -> Tensor:
    """The numbers from 0 to count - 1, int64 [count], in the order that follows from the seed, its use, and a number
    such as the epoch's, and from nothing else. Each gets 64 bits of Philox, a generator that is its specification, and
    they are sorted by these: a later version of PyTorch or numpy may shuffle in another way.
    """
    key, counter = (np.array(words, np.uint64) for words in ([seed % 2**64, use], [0, 0, 0, number]))
    bits = np.random.Philox(key=key, counter=counter).random_raw(count)
    return torch.from_numpy(np.argsort(bits, kind="stable").astype(np.int64))
