"""Random bits that a counter and a key say, whatever was drawn before: Philox4x32-10, by Salmon, Moraes, Dror and Shaw,
"Parallel Random Numbers: As Easy as 1, 2, 3" (2011). Triton's tl.randint4x computes the same in a kernel.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF  # the lower half of 64 bits


Words = TypeVar("Words", Tensor, np.ndarray)


def rounds(c: tuple[Words, Words, Words, Words], k: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """The words of counters and keys, each int64 within [0, 2**32), as philox computes them: also of numpy's arrays,
    which cost a fifth of the time where there are few of them.
    """
    c0, c1, c2, c3 = c
    k0, k1 = k
    for _ in range(ROUNDS):
        # Products of 64 bits wrap in int64, which leaves their bits as they are.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (second >> 32 & LOW) ^ c1 ^ k0, second & LOW
        c2, c3 = (first >> 32 & LOW) ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Four words of 32 random bits for each counter: int64 [..., 4], each within [0, 2**32).

    counter: int64 [..., 4], key: int64 [..., 2], of which the lower 32 bits count; their leading extents are broadcast.
    All is integer arithmetic, so that every machine gives the same.
    """
    c0, c1, c2, c3 = (counter & LOW).unbind(-1)
    k0, k1 = (key & LOW).unbind(-1)
    return torch.stack(rounds((c0, c1, c2, c3), (k0, k1)), -1)


def key_of(seed: Tensor) -> Tensor:
    """The key [..., 2] of seeds of 64 bits: their lower halves, then their upper ones, as tl.randint4x takes a seed."""
    return torch.stack([seed & LOW, seed >> 32 & LOW], -1)
