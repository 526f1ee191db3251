"""Graphs of one call each, of an operator that files may name, with arguments of the types that it takes and values at
random: what one who makes files to break a loader would try.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.storage.graph_json import DTYPES
from cnnfast.engine.storage.schemas import gives, schema

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 4097, 2**16, 2**20, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, 2**63)
NUMBERS += (-(2**63), 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308, -1e308)
FLOATS = (0.5, -0.5, 1e-5, 1e30, 70000.0, {"float": "inf"}, {"float": "nan"})
WORDS = ("none", "tanh", "relu", "constant", "floor", "hardtanh", "leaky_relu", "elu", "gelu", "reflect", "replicate")
SHAPES = (
    *[(2, 4, 6, 6)] * 3,
    *[(4,)] * 2,
    (4, 4, 3, 3),
    (4, 1, 3, 3),
    (1, 4, 1, 1),
    (2, 4, 1, 1),
    (2, 4),
    (4, 4),
    (2, 4, 5),
)
SHAPES += ((4, 4, 3), (2, 4, 5, 5, 5), (4, 4, 2, 2, 2), (), (0, 4, 6, 6), (4, 0, 3, 3))
COMMON = ("float32",) * 8


def argument(kind: Any, random: Random, tensor: Any) -> Any:
    """Of a type of a schema, as files write it. tensor: makes a reference to one."""
    match kind.kind():
        case "OptionalType":
            return argument(kind.getElementType(), random, tensor) if random.random() < 0.6 else None
        case "ListType":
            length = random.choice((0, 1, 1, 2, 2, 2, 2, 3, 4))
            return [argument(kind.getElementType(), random, tensor) for _ in range(length)]
        case "TensorType":
            return tensor()
        case "BoolType":
            return random.random() < 0.5
        case "StringType":
            return random.choice(WORDS)
        case "ScalarTypeType":
            return {"dtype": random.choice((*COMMON, *DTYPES))}
        case "FloatType" | "NumberType":
            return random.choice((*FLOATS, random.choice(NUMBERS), 1, 2))
    return random.choice((0, 1, 1, 1, 2, 2, 3, 4, -1, random.choice(NUMBERS)))


def graph_of_one_call(seed: str, operator: str | None = None) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """As `graph_json.from_data` reads it, and ones for its inputs."""
    random = Random(seed)
    operator = operator or random.choice(sorted(OPERATORS))
    inputs: list[dict[str, Any]] = []

    def tensor() -> Any:
        dtype = random.choice((*COMMON, *DTYPES))
        inputs.append({"name": f"x{len(inputs)}", "shape": list(random.choice(SHAPES)), "dtype": dtype})
        return {"value": inputs[-1]["name"]}

    args, kwargs = [], {}
    for one in schema(operator).arguments:
        if one.kwarg_only:
            if random.random() < 0.3:
                kwargs[one.name] = argument(one.real_type, random, tensor)
        elif one.has_default_value() and random.random() < 0.3:
            break
        else:
            args.append(argument(one.real_type, random, tensor))
    nodes: list[dict[str, Any]] = [{"name": one["name"], "input": place} for place, one in enumerate(inputs)]
    nodes.append({"name": "y", "call": operator, "args": args, "kwargs": kwargs})
    if gives(operator) == "tensors":
        nodes.append({"name": "z", "call": "python.getitem", "args": [{"value": "y"}, 0]})
    elif gives(operator) == "number":
        x = inputs[0]["name"] if inputs else "x"
        nodes.append({"name": "z", "call": "aten.reshape.default", "args": [{"value": x}, [-1, {"value": "y"}]]})
    data = {"inputs": inputs, "nodes": nodes, "results": [nodes[-1]["name"]], "conditions": []}
    return data, [torch.ones(one["shape"]).to(DTYPES[one["dtype"]]) for one in inputs]
