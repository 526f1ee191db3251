"""Small networks as cnnfast.freeze makes them, written by hand: no model, no capture. Integers everywhere, and powers
of two, so that results are exact in any order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from cnnfast.engine.graph import Graph, Input
from cnnfast.engine.images.preprocessing import Preprocessing
from cnnfast.engine.network import Network
from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.structures import Structure

LEAF = Structure("tensor")


class Building:
    """A graph that grows call by call."""

    def __init__(self, seed: int = 0) -> None:
        self.calls = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)

    def input(self, name: str) -> fx.Node:
        return self.calls.placeholder(name)

    def constant(self, name: str, *shape: int) -> fx.Node:
        if name not in self.constants:
            self.constants[name] = torch.randint(-2, 3, shape, generator=self.random).float()
        return self.calls.get_attr(name)

    def call(self, operator: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.calls.call_function(OPERATORS[operator], args, kwargs)

    def conv(self, name: str, x: fx.Node, c: int, k: int, residual: fx.Node | None = None, taps: int = 3) -> fx.Node:
        w, bias = self.constant(f"{name}.weight", k, c, taps, taps), self.constant(f"{name}.bias", k)
        pad = [taps // 2] * 2
        y = self.call("cnnfast.convolution", x, w, bias, residual, [1, 1], pad, [1, 1], 1, "relu", [])
        y.meta["pattern"] = "convolution"
        return y

    def graph(self, results: list[fx.Node], inputs: tuple[Input, ...], conditions: tuple[str, ...] = ()) -> Graph:
        self.calls.output(tuple(results))
        return Graph(self.calls, self.constants, inputs, conditions)


def residual_network(seed: int = 0) -> Network:
    """A block with a residual, a pool, a classifier with names and preprocessing; one input of any batch and size."""
    b = Building(seed)
    x = b.input("x")
    y = b.conv("stem", x, 3, 8)
    y = b.call("aten.max_pool2d.default", y, [2, 2], [2, 2], [0, 0], [1, 1], False)
    y = b.conv("block", b.conv("inner", y, 8, 8), 8, 8, residual=y)
    y = b.call("aten.mean.dim", y, [2, 3], False)
    y = b.call("cnnfast.linear", y, b.constant("classifier.weight", 5, 8), None, None, [])
    return Network(
        b.graph([y], (Input("x", (None, 3, None, None), torch.float32),), ("size(0, 2) >= 2",)),
        arguments=Structure("tuple", (LEAF,)),
        result=LEAF,
        dtype=torch.float32,
        result_dtypes=(torch.float32,),
        example=((1, 3, 8, 8),),
        preprocessing=Preprocessing((8, 8), None, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        classes=("tench", "goldfish", "größer", "鯉", 'a "quoted" name'),
    )


def network_of_every_argument() -> Network:
    """Every kind of argument that files have, several inputs and results, a tied constant, a constant as a result."""
    b = Building(1)
    x, y = b.input("input"), b.input("other")
    u = b.conv("tied", b.conv("tied", x, 4, 4), 4, 4)
    first, second = (b.call("python.getitem", b.call("aten.chunk.default", u, 2, 1), i) for i in range(2))
    u = b.call("aten.cat.default", [second, first, y], 1)
    u = b.call("aten.hardtanh.default", u, 0.0, float("inf"))
    u = b.call("aten.gelu.default", b.call("aten.mul.Tensor", u, 64), approximate="tanh")
    u = b.call("aten.add.Tensor", u, b.constant("shift", 1, 6, 1, 1), alpha=2)
    height = b.call("aten.sym_size.int", u, 2)
    width = b.call("python.floordiv", b.call("python.mul", height, 2), 2)
    flat = b.call("aten.reshape.default", u, [-1, 6, b.call("python.mul", height, width)])
    flat = b.call("aten.mean.dim", flat, [2], True, dtype=torch.float64)
    ceiled = b.call("aten.avg_pool2d.default", u, [2, 2], [2, 2], [0, 0], True, False, None)
    ceiled.meta["fused"] = ("avg_pool2d", "relu")
    b.constants["other_name"] = b.constants["shift"]
    return Network(
        b.graph(
            [flat, ceiled, b.calls.get_attr("other_name")],
            (Input("input", (None, 4, 6, 6), torch.float32), Input("other", (None, 2, 6, 6), torch.float32)),
        ),
        arguments=Structure("tuple", (LEAF, Structure("list", (LEAF, Structure("constant", value=None))))),
        result=Structure("dict", (LEAF, LEAF, LEAF), ("flat", "pooled", "shift")),
        dtype=torch.float32,
        result_dtypes=(torch.float64, torch.float32, torch.float32),
        example=((2, 4, 6, 6), (2, 2, 6, 6)),
        fixed="the network reshapes to 6 x 6",
    )


def half_network() -> Network:
    """In bfloat16, with integers for constants too."""
    b = Building(2)
    x = b.input("x")
    b.constants = {
        "weight": torch.randint(-2, 3, (6, 1, 3, 3), generator=b.random).bfloat16(),
        "steps": torch.arange(6).reshape(1, 6, 1, 1),
    }
    y = b.call("aten.conv2d.default", x, b.calls.get_attr("weight"), None, [1, 1], [1, 1], [1, 1], 6)
    y = b.call("aten.mul.Tensor", b.call("aten.relu.default", y), b.calls.get_attr("steps"))
    y = b.call("aten.adaptive_avg_pool2d.default", y, [2, 1])
    return Network(
        b.graph([y], (Input("x", (None, 6, 4, 4), torch.bfloat16),)),
        arguments=Structure("tuple", (LEAF,)),
        result=Structure("tuple", (LEAF,)),
        dtype=torch.bfloat16,
        result_dtypes=(torch.float32,),
        example=((2, 6, 4, 4),),
    )


NETWORKS = {
    "residual": residual_network,
    "every argument": network_of_every_argument,
    "half": half_network,
}


def inputs_of(network: Network, seed: int = 3) -> list[Tensor]:
    """Small integers, in the shapes of the example."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-3, 4, shape, generator=random).to(one.dtype)
        for shape, one in zip(network.example, network.graph.inputs, strict=True)
    ]
