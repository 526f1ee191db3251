"""A plan: what a graph does for inputs of one size, as plain data. Every number in it is known, and so is the place of
every value in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ref:
    """A value or a constant as an argument of a step, by its name."""

    name: str


@dataclass(frozen=True)
class Value:
    """A tensor that exists while a plan runs. It lies in a buffer, `offset` elements behind the buffer's beginning;
    buffer: None for the inputs, which lie where the caller has them.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    buffer: str | None
    offset: int = 0


@dataclass(frozen=True)
class Buffer:
    """Bytes of the arena, from `address` on, in use from step `first` to step `last`, both included. address: None for
    what belongs to the caller afterwards, a result, and is allocated anew in each run.
    """

    name: str
    bytes: int
    first: int
    last: int
    address: int | None


@dataclass(frozen=True)
class Step:
    """One call. operator: a name in operators.py. args, kwargs: as the operator takes them, with a Ref for each tensor.
    outputs: names of values. is_view: the outputs lie in the buffer of an argument, and nothing is computed. pattern:
    what it belongs to (patterns.py), for people: "convolution", "squeeze-excitation", or the empty string.
    """

    name: str
    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    is_view: bool = False
    pattern: str = ""


@dataclass(frozen=True)
class Plan:
    """inputs: names of values, in the order of the graph's inputs. results: a name of a value, or of a constant, for
    each result. arena: bytes.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    results: tuple[str, ...]
    values: dict[str, Value]
    buffers: dict[str, Buffer]
    arena: int
