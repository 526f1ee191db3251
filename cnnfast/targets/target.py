"""What a name stands for, and the error for a name that stands for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class TargetError(ValueError):
    """A model that cannot be had by its name, or a model without a shape for its input. The message says why, and what
    would be right.

    A class of its own: a ValueError that the user's code raises while it builds a model is not ours.
    """


@dataclass(frozen=True)
class Target:
    """What a name stands for: `value` is a module or a function, `source` the library, module or file that has it."""

    name: str
    source: str
    value: Callable[..., Any]
