"""A stand-in for torch in torchvision's transforms, whose random numbers are given: so that torchvision's own rules say
what is drawn from the numbers that ours were drawn from.

    monkeypatch.setattr(_geometry, "torch", ScriptedTorch(uniform=[0.1, 0.7], whole=[[0.5, 0.2]]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class ScriptedNumber(float):
    """What torch.empty(1) is, and what becomes of it."""

    script: ScriptedTorch

    def uniform_(self, low: float, high: float) -> ScriptedNumber:
        return ScriptedNumber(float(low) + self.script.next_uniform() * (float(high) - float(low)))

    def item(self) -> float:
        return float(self)


class ScriptedTorch:
    """uniform: numbers in (0, 1) that torch.empty(1).uniform_ is made of, in the order of the calls.

    whole: for each try, those that torch.randint is made of; the try is that of the last two uniform numbers, or the
    first where there was none.
    """

    def __init__(self, uniform: Sequence[float] = (), whole: Sequence[Sequence[float]] = ((),)) -> None:
        self.uniform, self.whole = list(uniform), [list(numbers) for numbers in whole]
        self.used = 0

    def next_uniform(self) -> float:
        self.used += 1
        return float(self.uniform[self.used - 1])

    def empty(self, count: int) -> ScriptedNumber:
        assert count == 1
        number = ScriptedNumber()
        number.script = self
        return number

    def randint(self, *bounds: int, size: Sequence[int]) -> ScriptedNumber:
        low, high = bounds if len(bounds) == 2 else (0, *bounds)
        number = self.whole[max(self.used // 2 - 1, 0)].pop(0)
        return ScriptedNumber(low + math.floor(number * (high - low)))

    def randperm(self, count: int) -> Sequence[int]:
        return range(count)

    def exp(self, number: float) -> ScriptedNumber:
        return ScriptedNumber(math.exp(number))

    def clamp(self, number: float, min: float = -math.inf, max: float = math.inf) -> float:
        return math.floor(number if min <= number <= max else min if number < min else max)

    def tensor(self, value: object) -> object:
        import torch

        return torch.tensor(value)
