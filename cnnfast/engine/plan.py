"""A plan: what a graph does for inputs of one size, as plain data. Every number in it is known, and so is the place of
every value in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ref:
    """A value or a constant as an argument of a step, by its name. In place of a list of tensors, a list of these."""

    name: str


@dataclass(frozen=True)
class Value:
    """A tensor that exists while a plan runs. It lies in a buffer, `offset` elements behind the buffer's beginning;
    stride, too, is in elements. An input's buffer has the input's name.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    buffer: str
    offset: int = 0

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Buffer:
    """Bytes that values lie in, from step `first` to step `last`, both included: values in one buffer are views of one
    another, parts of a concatenation, or written one over the other. address: where in the arena they begin; None for
    what is not in it: inputs, which the caller has, and results, which are allocated anew in each run and belong to the
    caller afterwards. `last` of a result is the number of steps, one behind the last.
    """

    name: str
    bytes: int
    first: int
    last: int
    address: int | None


@dataclass(frozen=True)
class Piece:
    """A part of a concatenation, a value or a constant by its name, and the place in the output that it belongs to."""

    part: str
    place: Value


@dataclass(frozen=True)
class Step:
    """One call. operator: a name in operators.py. args, kwargs: as the operator takes them, with a Ref for each tensor.
    outputs: names of values; several, where the operator gives a list or a tuple of tensors.

    is_view: the outputs lie where arguments lie, and there is nothing to compute. overwrites: the argument that an
    element-wise output is written over, or the empty string: both values have one place in memory. pieces: what a
    concatenation has to copy; the other parts lie in the output already, because the steps that made them wrote them
    there.

    pattern: what it belongs to (patterns.py), for people: "convolution", "squeeze-excitation", or the empty string.
    """

    name: str
    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    is_view: bool = False
    overwrites: str = ""
    pieces: tuple[Piece, ...] = ()
    pattern: str = ""


@dataclass(frozen=True)
class Plan:
    """inputs, results: names of values, in the order of the graph's. Inputs are expected with the strides of their
    values. Every result lies in a buffer that it fills and that is the caller's afterwards: of a result that is an
    input, a constant or a small part of something, the last steps make a copy, aten.clone.default. One name may be
    there twice. arena: bytes.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    results: tuple[str, ...]
    values: dict[str, Value]
    buffers: dict[str, Buffer]
    arena: int
