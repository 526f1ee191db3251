"""Graphs of the engine, written by hand: a function of values and of constants that calls torch.ops.aten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from cnnfast.engine.folding.folding import fold
from cnnfast.engine.graph import Graph, Input
from cnnfast.engine.operators import NAMES

Shape = tuple[int | None, ...]


def written(
    function: Callable[..., Any], *shapes: Shape, dtype: torch.dtype = torch.float32, **constants: Tensor
) -> Graph:
    """The graph of function(constants, *values), which gives a value or a tuple of values. shapes: those of the values,
    with None for a size that may be any.
    """
    calls = fx.Graph()
    names = [f"x{i}" for i in range(len(shapes))]
    tracer = fx.proxy.GraphAppendingTracer(calls)
    values = [tracer.proxy(calls.placeholder(name)) for name in names]
    held = SimpleNamespace(**{name: tracer.proxy(calls.get_attr(name)) for name in constants})
    result = function(held, *values)
    results = result if isinstance(result, tuple) else (result,)
    calls.output(tuple(proxy.node for proxy in results))
    inputs = tuple(Input(name, shape, dtype) for name, shape in zip(names, shapes, strict=True))
    return Graph(calls, dict(constants), inputs)


def called(graph: Graph) -> Counter[str]:
    """How often a graph calls each operator, by its name in operators.py or, of others, PyTorch's."""
    nodes = [node for node in graph.calls.nodes if node.op == "call_function"]
    return Counter(NAMES.get(node.target) or f"aten.{node.target.__name__}" for node in nodes)


def in_float64(graph: Graph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a graph gives if everything is computed in float64."""
    exact = {name: t.double() if t.is_floating_point() else t for name, t in graph.constants.items()}
    wide = tuple(Input(i.name, i.shape, torch.float64) for i in graph.inputs)
    return Graph(graph.calls, exact, wide).run([x.double() if x.is_floating_point() else x for x in inputs])


def exactly_folded(graph: Graph, *inputs: Tensor) -> Graph:
    """The folded graph, after asserting that it gives, bit for bit, what float64 says, for inputs and constants of
    which every result is representable.
    """
    folded = fold(graph, inputs[0].dtype)
    folded.calls.lint()
    for ours, right in zip(folded.run(inputs), in_float64(graph, inputs), strict=True):
        assert ours.dtype == inputs[0].dtype
        assert torch.equal(ours.double(), right)
    return folded


def relative_error(ours: Tensor, right: Tensor) -> float:
    """Of all of a result, in the root mean square."""
    return float((ours.double() - right).norm() / right.norm())
