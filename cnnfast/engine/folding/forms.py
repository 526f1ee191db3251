"""One form for all convolutions, and one for all products with a constant matrix: calls of the engine's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import Graph
from ..operators import OURS
from .sizes import Sizes

aten = torch.ops.aten

CONVOLUTION, LINEAR, AFFINE, SUM = (OURS[name] for name in ("convolution", "linear", "affine", "sum"))
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
# The arguments of the engine's operators, in their order.
WEIGHT, BIAS = 1, 2


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of PyTorch's, by name, with the defaults of those that are not given."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    return given | dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)


def use_one_form(graph: Graph, sizes: Sizes) -> None:
    for node in list(graph.calls.nodes):
        if node.op != "call_function":
            continue
        if node.target in CONVOLUTIONS:
            _convolution(graph, sizes, node)
        elif node.target in (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default):
            _linear(graph, node)


def _convolution(graph: Graph, sizes: Sizes, node: fx.Node) -> None:
    given = arguments(node)
    weight = graph.constant(given["weight"])
    if weight is None or not _constant_or_none(graph, given["bias"]) or sizes.rank(given["input"]) != weight.dim():
        return
    taps = weight.shape[2:]
    stride, padding, dilation = (_each(given[name], len(taps)) for name in ("stride", "padding", "dilation"))
    node.target, node.kwargs = CONVOLUTION, {}
    geometry = stride, padding, dilation, given["groups"]
    node.args = (given["input"], given["weight"], given["bias"], None, *geometry, None, ())


def _linear(graph: Graph, node: fx.Node) -> None:
    given = arguments(node)
    if node.target is aten.linear.default:
        x, weight, bias = given["input"], given["weight"], given["bias"]
    else:
        bias, x = (given["self"], given["mat1"]) if "mat1" in given else (None, given["self"])
        weight = given["other"] if "other" in given else given["mat2"]
    matrix, addend = graph.constant(weight), graph.constant(bias)
    if matrix is None or matrix.dim() != 2 or not isinstance(x, fx.Node) or not _constant_or_none(graph, bias):
        return
    if node.target is not aten.linear.default:
        if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
            return
        if addend is not None and addend.shape != matrix.shape[1:]:
            return
        with graph.calls.inserting_before(node):
            weight = graph.new_constant(matrix.t())
    node.target, node.kwargs = LINEAR, {}
    node.args = (x, weight, bias, None, ())


def _constant_or_none(graph: Graph, value: Any) -> bool:
    return value is None or graph.constant(value) is not None


def _each(value: Any, count: int) -> list[Any]:
    """One for each dimension: PyTorch takes one for all, too."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values
