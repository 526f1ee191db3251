"""Which sizes of a graph's values are known before the batch is: computed twice, on meta tensors, with two batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph

BATCH = "N"
# A size that depends on the batch without being it: 2 * N, or N - 1.
OTHER = "of N"
# What the example's batch is multiplied with in the two runs: divisible by all small numbers, so that a network which
# divides its batch into groups still runs, and far apart.
MULTIPLES = (24, 36)


class NoOnnxForm(ValueError):
    """An operator, or the way it is called, has no form in ONNX that computes the same."""


@dataclass(frozen=True)
class KnownTensor:
    """Of a tensor, or of a number that depends on the batch, whose shape is ()."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


def known_of_all(graph: Graph, shapes: Sequence[Sequence[int]]) -> dict[fx.Node, Any]:
    """For each placeholder, constant and call: a KnownTensor, the number itself where the batch does not change it, or
    a list of these. Inputs are as large as `shapes` says, but for the batch where the graph leaves it open.

    A number made of numbers that depend on the batch depends on it itself, equal or not in the two runs.
    """
    batch = {shape[0] for given, shape in zip(graph.inputs, shapes, strict=True) if given.shape[:1] == (None,)}
    if len(batch) > 1:
        raise ValueError(f"the inputs have one batch size between them; got {sorted(batch)}")
    largest = max(1, *batch) if batch else 1
    sizes = [largest * multiple for multiple in MULTIPLES]
    runs = []
    for size in sizes:
        inputs = [
            torch.empty(
                (size, *shape[1:]) if given.shape[:1] == (None,) else tuple(shape), dtype=given.dtype, device="meta"
            )
            for given, shape in zip(graph.inputs, shapes, strict=True)
        ]
        try:
            runs.append(graph.values(inputs))
        except (RuntimeError, ValueError, IndexError) as error:
            raise NoOnnxForm(f"a batch that is free: with {size} images it fails: {error}") from error

    known: dict[fx.Node, Any] = {}
    for node, first in runs[0].items():
        depends = any(
            isinstance(known[argument], KnownTensor) and not known[argument].shape for argument in node.all_input_nodes
        )
        known[node] = _compared(first, runs[1][node], sizes, depends)
    return known


def _compared(first: Any, second: Any, sizes: Sequence[int], depends: bool) -> Any:
    if isinstance(first, Tensor):
        shape = zip(first.shape, second.shape, strict=True)
        return KnownTensor(tuple(a if a == b else BATCH if [a, b] == sizes else OTHER for a, b in shape), first.dtype)
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            raise NoOnnxForm("as many results as the batch is large")
        return [_compared(a, b, sizes, depends) for a, b in zip(first, second, strict=True)]
    return KnownTensor((), torch.int64) if first != second or depends else first
