"""Graphs as plain data, for JSON.

A node is {"name", "input": its place}, {"name", "constant": its name} or {"name", "call": an operator, "args",
"kwargs", "meta"}, each after those that it uses. Arguments are null, booleans, numbers, words and lists as JSON has
them, and {"value": the name of a node}, {"dtype": "float32"}, {"float": "inf"}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Input
from ..operators import NAMES, OPERATORS
from .plain_data import field, shortened, strings
from .schemas import LARGEST_NUMBER, check_arguments, gives

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a node carries for people and runners, beyond its call.
META = ("pattern", "fused")
# Of nodes, and of the members of a list: far above what networks have, and soon gone through.
MOST_NODES = 2**16
LONGEST_LIST = 2**12
DEEPEST = 3
LONGEST_NAME = 1000
MOST_DIMENSIONS = 16


def to_data(graph: Graph) -> dict[str, Any]:
    """Raises ValueError, with the node's name, where a call cannot be written: of an operator, or with an argument,
    that files do not have.
    """
    inputs = [{"name": one.name, "shape": list(one.shape), "dtype": dtype_name(one.dtype)} for one in graph.inputs]
    places = {node: place for place, node in enumerate(graph.calls.find_nodes(op="placeholder"))}
    nodes = [_node_data(node, places) for node in graph.calls.nodes if node.op != "output"]
    results = [node.name for node in graph.results]
    return {"inputs": inputs, "nodes": nodes, "results": results, "conditions": list(graph.conditions)}


def _node_data(node: fx.Node, places: Mapping[fx.Node, int]) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"name": node.name, "input": places[node]}
    if node.op == "get_attr":
        return {"name": node.name, "constant": str(node.target)}
    name = NAMES.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    if name is None:
        raise ValueError(f"{node.name} calls {node.target}, and files have no such operator")
    try:
        data: dict[str, Any] = {"name": node.name, "call": name, "args": [_argument_data(one) for one in node.args]}
        if node.kwargs:
            data["kwargs"] = {key: _argument_data(one) for key, one in node.kwargs.items()}
    except ValueError as error:
        raise ValueError(f"{node.name}: {error}") from None
    meta = {key: _plain(node.meta[key]) for key in META if node.meta.get(key)}
    return {**data, "meta": meta} if meta else data


def _argument_data(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"value": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, list | tuple):
        return [_argument_data(one) for one in value]
    raise ValueError(f"files have no {type(value).__name__} for an argument: {value!r}")


def from_data(data: Any, constants: Mapping[str, Tensor]) -> Graph:
    """The graph that `to_data` wrote, over these constants. Raises ValueError, which says what is wrong, for anything
    that it cannot have written.
    """
    inputs = tuple(_input(one) for one in field(data, "inputs", list))
    conditions = tuple(strings(field(data, "conditions", list), "conditions"))
    calls = _Reader(constants, inputs)
    described = field(data, "nodes", list)
    if len(described) > MOST_NODES:
        raise ValueError(f"the graph has {len(described):,} nodes, and the most that are read are {MOST_NODES:,}")
    for one in described:
        calls.add(one)
    results = [calls.tensor(name) for name in strings(field(data, "results", list), "the names of results")]
    calls.calls.output(tuple(results))
    if calls.taken != len(inputs):
        raise ValueError(f"{calls.taken} nodes take an input, and there are {len(inputs)} inputs")
    return Graph(calls.calls, dict(constants), inputs, conditions)


class _Reader:
    """Makes nodes one after the other."""

    def __init__(self, constants: Mapping[str, Tensor], inputs: tuple[Input, ...]) -> None:
        self.calls = fx.Graph()
        self.constants = constants
        self.inputs = inputs
        self.taken = 0
        self.nodes: dict[str, fx.Node] = {}
        self.kinds: dict[fx.Node, str] = {}

    def add(self, data: Any) -> None:
        name = field(data, "name", str)
        if not name.isidentifier() or len(name) > LONGEST_NAME:
            raise ValueError(f"{shortened(name)} is no name of a node")
        if name in self.nodes:
            raise ValueError(f"two nodes are called {name!r}")
        try:
            node, kind = self._made(data, name)
        except ValueError as error:
            raise ValueError(f"node {name}: {error}") from None
        node.name = name  # fx avoids the names of Python's own functions, and input is one
        self.nodes[name] = node
        self.kinds[node] = kind

    def tensor(self, name: str) -> fx.Node:
        node = self._node(name)
        if self.kinds[node] != "tensor":
            raise ValueError(f"{name} is no tensor, and cannot be a result")
        return node

    def _made(self, data: dict[str, Any], name: str) -> tuple[fx.Node, str]:
        match sorted(data.keys() - {"name", "args", "kwargs", "meta"}):
            case ["input"] if data.keys() == {"name", "input"}:
                if field(data, "input", int) != self.taken or self.taken == len(self.inputs):
                    raise ValueError(f"it is input {data['input']} of {len(self.inputs)}, and {self.taken} is next")
                self.taken += 1
                return self.calls.create_node("placeholder", name, name=name), "tensor"
            case ["constant"] if data.keys() == {"name", "constant"}:
                constant = field(data, "constant", str)
                if constant not in self.constants:
                    raise ValueError(f"the file has no constant {shortened(constant)}")
                return self.calls.create_node("get_attr", constant, name=name), "tensor"
            case ["call"]:
                return self._call(data, name)
        raise ValueError("it is neither an input nor a constant nor a call")

    def _call(self, data: dict[str, Any], name: str) -> tuple[fx.Node, str]:
        operator = field(data, "call", str)
        if operator not in OPERATORS:
            raise ValueError(f"it calls {shortened(operator)}, which this version of cnnfast does not know")
        args = tuple(self._argument(one) for one in _not_too_long(field(data, "args", list)))
        kwargs = {key: self._argument(one) for key, one in field(data, "kwargs", dict, {}).items()}
        check_arguments(operator, args, kwargs, self.kinds)
        node = self.calls.create_node("call_function", OPERATORS[operator], args, kwargs, name=name)
        for key, value in field(data, "meta", dict, {}).items():
            if key not in META:
                raise ValueError(f"it has {shortened(key)}, which is unknown")
            node.meta[key] = _label(value)
        return node, gives(operator)

    def _argument(self, data: Any, depth: int = 0) -> Any:
        if data is None or isinstance(data, bool | str):
            return data
        if isinstance(data, int | float):
            return data if isinstance(data, int) else _finite(data)
        if isinstance(data, list):
            if depth == DEEPEST:
                raise ValueError(f"it has lists in lists, deeper than {DEEPEST}")
            return [self._argument(one, depth + 1) for one in _not_too_long(data)]
        match data:
            case {"value": str(name)} if len(data) == 1:
                return self._node(name)
            case {"dtype": str(name)} if len(data) == 1:
                return dtype(name)
            case {"float": "inf" | "-inf" | "nan" as word} if len(data) == 1:
                return float(word)
        raise ValueError(f"{shortened(data)} is no argument")

    def _node(self, name: str) -> fx.Node:
        if name not in self.nodes:
            raise ValueError(f"no node before is called {shortened(name)}")
        return self.nodes[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Raises ValueError for a dtype that files do not have."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{dtype} is no dtype that files have")
    return DTYPE_NAMES[dtype]


def dtype(name: Any) -> torch.dtype:
    """Raises ValueError for what is no name of a dtype that files have."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{shortened(name)} is no dtype that files have")
    return DTYPES[name]


def size(value: Any) -> int:
    """Raises ValueError for what is no size of a tensor's dimension."""
    if type(value) is not int or not 0 <= value <= LARGEST_NUMBER:
        raise ValueError(f"{shortened(value)} is no size")
    return value


def _input(data: Any) -> Input:
    shape = tuple(None if one is None else size(one) for one in field(data, "shape", list))
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"an input has {len(shape)} dimensions")
    return Input(field(data, "name", str), shape, dtype(field(data, "dtype", str)))


def _finite(value: float) -> float:
    """Python's JSON reads 1e999 as infinity."""
    if not math.isfinite(value):
        raise ValueError("it has a number that is out of bounds")
    return value


def _plain(label: Any) -> Any:
    return list(label) if isinstance(label, tuple) else label


def _label(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(strings(value, "words"))


def _not_too_long(values: list[Any]) -> list[Any]:
    if len(values) > LONGEST_LIST:
        raise ValueError(f"it has a list of {len(values):,}, and the longest that are read have {LONGEST_LIST:,}")
    return values
