"""The time that a whole run of measurements may take."""

from __future__ import annotations

import math
import time


class Budget:
    """Seconds that something may take as a whole, counted from when this object is made; None: as many as it takes."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.began = time.monotonic()

    @property
    def left(self) -> float:
        """The seconds that are left: negative once more were spent, infinite where there is no limit."""
        return math.inf if self.seconds is None else self.began + self.seconds - time.monotonic()

    def __str__(self) -> str:
        """Why something was left out, once nothing is left."""
        return "" if self.seconds is None else f"the budget of {self.seconds:g} s was spent"
