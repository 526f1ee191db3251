"""How long measuring may take in all."""

from __future__ import annotations

import math
import time


class Budget:
    """Seconds for the whole of something, counted from when this is made. None: as many as it takes."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.began = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are left: below zero once more were spent, infinite where there is no limit."""
        return math.inf if self.seconds is None else self.began + self.seconds - time.monotonic()

    def __str__(self) -> str:
        """Why something is left out."""
        return "" if self.seconds is None else f"the budget of {self.seconds:g} s was spent"
