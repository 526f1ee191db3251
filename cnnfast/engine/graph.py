"""A captured network: calls of operators on values and constants, for inputs of any batch size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .operators import MAKERS


@dataclass(frozen=True)
class Input:
    """A tensor that the network takes. shape: None stands for a size that may be any."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass
class Graph:
    """calls: placeholders in the order of `inputs`; get_attr nodes, whose targets are names in `constants`;
    call_function nodes, whose targets are those of operators.py; and one output, a flat tuple of nodes. No call writes
    into a value, and no result depends on strides: a runner may keep values in whatever layout suits it.

    conditions: what the sizes of the inputs must satisfy, as conditions.py reads it.
    """

    calls: fx.Graph
    constants: dict[str, Tensor]
    inputs: tuple[Input, ...]
    conditions: tuple[str, ...] = ()
    _made: int = field(default=0, repr=False)

    @property
    def results(self) -> tuple[fx.Node, ...]:
        return tuple(self.calls.output_node().args[0])  # type: ignore[arg-type]

    def constant(self, node: Any) -> Tensor | None:
        """The tensor behind a get_attr node; None of anything else."""
        return self.constants[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def new_constant(self, value: Tensor) -> fx.Node:
        """A node for a new constant, where the graph inserts at present."""
        self._made += 1
        while (name := f"folded_{self._made}") in self.constants:  # a graph that was read from a file has some
            self._made += 1
        self.constants[name] = value.detach().contiguous()
        return self.calls.get_attr(name)

    def prune(self) -> None:
        """Forgets calls, and constants, that no result needs."""
        for node in reversed(list(self.calls.nodes)):
            if not node.users and node.op in ("call_function", "get_attr"):
                self.calls.erase_node(node)
        used = {str(node.target) for node in self.calls.nodes if node.op == "get_attr"}
        self.constants = {name: value for name, value in self.constants.items() if name in used}

    def copy(self) -> Graph:
        """Another graph, which can be rewritten, over the same tensors."""
        calls = fx.Graph()
        calls.output(calls.graph_copy(self.calls, {}))
        return Graph(calls, dict(self.constants), self.inputs, self.conditions, self._made)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The results, by plain PyTorch, call by call."""
        values = self.values(inputs)
        return tuple(values[node] for node in self.results)

    def values(self, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """What every node gives, by plain PyTorch. On meta tensors nothing is computed but the shapes."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        device = inputs[0].device if inputs else torch.device("cpu")
        with torch.inference_mode(device.type != "meta"), torch.no_grad():
            for node in self.calls.nodes:
                if node.op == "placeholder":
                    values[node] = next(given)
                elif node.op == "get_attr":
                    values[node] = self.constants[str(node.target)].to(device)
                elif node.op == "call_function":
                    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                    if node.target in MAKERS:
                        kwargs = {**kwargs, "device": device}
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        copied = self.copy()
        copied.constants = copy.deepcopy(self.constants, memo)
        return copied
