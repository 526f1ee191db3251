"""Whether the calls of a graph from a file fit together, and how much memory they take: found on meta tensors, which
have shapes and no elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .demands import check_demands
from .graph import Graph
from .operators import NAMES
from .schemas import LARGEST_NUMBER, by_name

# Of the values of a graph together, in bytes: so much is always allowed, and so many times what inputs and constants
# have. Those of ResNet-50, one image of 224 pixels, have twice the bytes of its weights.
ALWAYS_ALLOWED = 2**31
TIMES = 1024
# A split into parts of one element each would make as many tensors as there are elements. How many parts an operator
# makes, of its arguments; of those that take a list of lengths, graph_json.py bounds the list.
MOST_PARTS = 2**12
PARTS: dict[str, Callable[..., int]] = {
    "aten.chunk.default": lambda x, chunks, dim=0: min(chunks, x.shape[dim]),
    "aten.split.Tensor": lambda x, split_size, dim=0: x.shape[dim] // max(split_size, 1),
}


def walk(graph: Graph, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """The results, on meta, for inputs of these shapes. Raises ValueError, with the name of the node, where a call
    fails or makes a value that is absurdly large.
    """
    meta = [
        torch.empty(tuple(shape), dtype=one.dtype, device="meta")
        for shape, one in zip(shapes, graph.inputs, strict=True)
    ]
    constants = {name: value.to("meta") for name, value in graph.constants.items()}
    left = max(ALWAYS_ALLOWED, TIMES * sum(one.nbytes for one in (*meta, *constants.values())))
    values: dict[fx.Node, Any] = {}
    given = iter(meta)
    with torch.no_grad():
        for node in graph.calls.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = constants[str(node.target)]
            elif node.op == "call_function":
                name = NAMES[node.target]  # type: ignore[index]
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    if name in PARTS and PARTS[name](*args, **kwargs) > MOST_PARTS:
                        raise ValueError(f"more than {MOST_PARTS:,} parts")
                    check_demands(name, by_name(name, args, kwargs))
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
                except Exception as error:  # whatever an operator says of arguments that do not fit
                    raise ValueError(f"node {node.name}: {name}: {error}") from None
                left -= _bytes(value)
                if left < 0:
                    raise ValueError(f"node {node.name}: too large a declared size: its values would fill the memory")
                values[node] = value
    return tuple(values[node] for node in graph.results)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    if abs(value) > LARGEST_NUMBER:
        raise ValueError("a size is too large")
    return 0
