"""Sets of buffers that take turns, so that a step finds its operands no warmer in the cache than a network leaves them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .timing import Step

PROCESSOR_CACHE = 2**24  # as much of a processor's last-level cache as one thread is given credit for
MOST_COPIES = 64


def copies_for(bytes_of_one: int, device: torch.device) -> int:
    """How many sets, each of so many bytes, fill the device's last-level cache twice; at least 1, at most MOST_COPIES."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else PROCESSOR_CACHE
    return max(1, min(MOST_COPIES, -(-2 * cache // max(1, bytes_of_one))))


def rotating(steps: Sequence[Step]) -> Step:
    """The steps in turn; the first one first."""
    turn = itertools.cycle(steps)
    return steps[0] if len(steps) == 1 else lambda: next(turn)()
