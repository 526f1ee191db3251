"""What sizes the values of a graph have, whatever the sizes that its inputs are free to have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph
from ..planning.conditions import violated

# (N, H, W): numbers in the place of sizes that may be any. Networks ask for multiples of 32, of 64 or of 7 times 32, or
# for squares, or for signals that are long; the odd numbers tell a division that rounds up from one that rounds down.
TRIALS = (
    *((2, 224, 224), (3, 256, 320), (5, 225, 257), (3, 448, 448), (3, 256, 256), (2, 64, 64), (3, 96, 96)),
    *((2, 4096, 4096), (3, 8192, 8192)),
)
ENOUGH = 3  # where more than the batch is free, and otherwise one fewer

Shapes = tuple[tuple[int, ...], ...]


class Sizes:
    """Of every value, the shapes that it has in a few runs of the graph on tensors without data, each with other
    numbers for the sizes that are free. What is equal in all of them is equal by construction: a size is a polynomial
    of the free ones, but for divisions that round. example: shapes of all inputs that the network can take.
    """

    def __init__(self, graph: Graph, example: Shapes | None = None) -> None:
        self.shapes: list[Shapes] = []  # of all inputs, in each run
        self.runs: list[dict[fx.Node, Any]] = []
        images = any(None in given.shape[1:] for given in graph.inputs)
        for shapes in _trials(graph, example):
            inputs = [torch.empty(s, dtype=i.dtype, device="meta") for s, i in zip(shapes, graph.inputs, strict=True)]
            try:
                self.runs.append(graph.values(inputs))
            except Exception:  # of whatever kind: operators refuse sizes that the network cannot take
                continue
            self.shapes.append(shapes)
            if len(self.runs) == (ENOUGH if images else ENOUGH - 1):
                break
        self.proven = len(self.runs) > 1 or all(None not in given.shape for given in graph.inputs)

    def of(self, node: Any) -> tuple[Tensor, ...]:
        """A value in each run, without data; nothing of what is no tensor."""
        values = [run.get(node) for run in self.runs] if isinstance(node, fx.Node) else []
        return tuple(value for value in values if isinstance(value, Tensor))

    def rank(self, node: Any) -> int | None:
        return next((value.dim() for value in self.of(node)), None)

    def dtype(self, node: Any) -> torch.dtype | None:
        return next((value.dtype for value in self.of(node)), None)

    def size(self, node: Any, axis: int) -> int | None:
        """The size of an axis; None if it depends on the inputs."""
        sizes = {value.shape[axis] for value in self.of(node)}
        return sizes.pop() if len(sizes) == 1 and self.proven else None

    def equal(self, a: Any, b: Any) -> bool:
        """Whether two values have the same shape, for inputs of every size, and the same dtype."""
        pairs = list(zip(self.of(a), self.of(b), strict=False))
        return self.proven and bool(pairs) and all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Another call gives now what `old` gave."""
        for run in self.runs:
            run[new] = run[old]


def _trials(graph: Graph, example: Shapes | None) -> Iterator[Shapes]:
    """Shapes of all inputs."""
    seen = set()
    trials: list[Shapes] = [] if example is None else [example]
    for n, h, w in TRIALS:
        numbers = {0: n, 3: w}
        trials.append(
            tuple(
                tuple(numbers.get(axis, h) if size is None else size for axis, size in enumerate(given.shape))
                for given in graph.inputs
            )
        )
    for shapes in trials:
        if shapes not in seen and not violated(graph.conditions, shapes):
            seen.add(shapes)
            yield shapes
