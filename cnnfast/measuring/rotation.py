"""Sets of buffers that take turns, so that a step finds its operands no warmer in the cache than in a network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .timing import Step

PROCESSOR_CACHE = 2**24  # bytes: how much of a processor's last-level cache one thread is assumed to have
MOST_COPIES = 64


def copies_for(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of so many bytes fill the device's last-level cache twice: at least 1, and at most MOST_COPIES."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else PROCESSOR_CACHE
    return max(1, min(MOST_COPIES, -(-2 * cache // max(1, bytes_of_one))))


def rotating(steps: Sequence[Step]) -> Step:
    """A step that runs the given steps in turn, one at each call, beginning with the first."""
    turn = itertools.cycle(steps)
    return steps[0] if len(steps) == 1 else lambda: next(turn)()
