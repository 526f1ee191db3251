"""The random numbers that a job starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Numbers:
    """Normally distributed numbers in float32. They are drawn once, on the device that they are for, and shared by all
    who ask for the same.

    A GPU draws in a second what takes one thread of a processor minutes. Each device draws the same numbers every time.
    """

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, tuple[int, ...], torch.device], Tensor] = {}

    @property
    def count(self) -> int:
        """How many numbers were drawn so far."""
        return sum(t.numel() for t in self.drawn.values())

    def normal(self, seed: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """A tensor that is not to be written into, since others get the same. On the meta device nothing is drawn."""
        key = seed, tuple(shape), device
        if key not in self.drawn:
            generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
            self.drawn[key] = torch.randn(key[1], generator=generator, device=device)
        return self.drawn[key]
