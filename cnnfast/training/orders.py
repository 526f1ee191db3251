"""Orders that follow from a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def shuffled(count: int, *numbers: int) -> Tensor:
    """The numbers from 0 to count - 1 in an order that follows from the other numbers alone, at most four of 64 bits:
    int64 [count]. Each gets 64 bits of Philox, a generator that is its specification, and they are sorted by these: an
    order of torch.randperm's or numpy's may change with their versions.
    """
    words = np.array([number % 2**64 for number in numbers] + [0] * (4 - len(numbers)), np.uint64)
    bits = np.random.Philox(key=words[:2], counter=np.array([0, 0, *words[2:]], np.uint64)).random_raw(count)
    return torch.from_numpy(np.argsort(bits, kind="stable").astype(np.int64))
