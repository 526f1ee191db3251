"""What a name stands for, and the error for a name that stands for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class TargetError(ValueError):
    """A model that cannot be had by its name, or a model without a shape for its input. The message says why, and what
    would be right.

    What the user's own code raised while it was imported or built the model is its __cause__.
    """


@dataclass(frozen=True)
class Target:
    """What a name stands for: `value` is a module or a function, `source` the library, module or file that has it."""

    name: str
    source: str
    value: Callable[..., Any]
