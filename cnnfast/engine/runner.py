"""What runs a network on inputs of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Runner(Protocol):
    """name: for reports: "onnxruntime" or "oneDNN". Several threads may call one runner at the same time."""

    name: str

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results, which belong to the caller: no later call writes into them."""
        ...

    def served_by(self) -> dict[str, str]:
        """What serves each step, by the name of the graph's node."""
        ...

    def profile(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        """Seconds that each step takes, by the name of the graph's node."""
        ...
