"""A graph as an ONNX model, for onnxruntime and for whatever else reads ONNX."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..graph import Graph
from ..operators import MAKERS, NAMES
from . import (
    onnx_activations,
    onnx_elementwise,
    onnx_functions,
    onnx_layers,
    onnx_picking,
    onnx_pools,
    onnx_products,
    onnx_reductions,
    onnx_resizing,
    onnx_shapes,
)
from .onnx_bounds import spell_bounds
from .onnx_sizes import KnownTensor, NoOnnxForm, known_of_all
from .onnx_writer import OnnxValue, OnnxWriter

if TYPE_CHECKING:
    import onnx

__all__ = ["NoOnnxForm", "model_of", "save", "to_onnx"]

FORMS: dict[str, Callable[..., Any]] = {
    **onnx_elementwise.FORMS,
    **onnx_functions.FORMS,
    **onnx_activations.FORMS,
    **onnx_products.FORMS,
    **onnx_layers.FORMS,
    **onnx_pools.FORMS,
    **onnx_resizing.FORMS,
    **onnx_reductions.FORMS,
    **onnx_shapes.FORMS,
    **onnx_picking.FORMS,
}
# The limit of the format that ONNX is written in.
LARGEST_FILE = 2**31 - 1


def to_onnx(
    graph: Graph,
    shapes: Sequence[Sequence[int]],
    inputs: Sequence[str] | None = None,
    results: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """The graph for inputs of these shapes; the batch is free where the graph leaves it open. inputs, results: names;
    without them "input" and "result", numbered where there are several.

    Raises NoOnnxForm, a ValueError, that names every call which cannot be written.
    """
    return model_of(graph, shapes, inputs, results)[0]


def save(model: onnx.ModelProto, path: str | os.PathLike[str], external_data: bool = False) -> None:
    """Writes the model; with external_data its constants into a second file beside it, "<name>.data".

    Raises ValueError where one file cannot hold the model.
    """
    import onnx

    path = Path(path)
    if external_data:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)  # onnx takes the constants out of the model that it saves
        onnx.save_model(copied, path, save_as_external_data=True, location=f"{path.name}.data")
        return
    size = sum(len(constant.raw_data) for constant in model.graph.initializer)
    if size > LARGEST_FILE - 2**24:
        raise ValueError(f"{path}: {size / 2**30:.1f} GiB of constants; one ONNX file holds 2: pass external_data=True")
    onnx.save_model(model, path)


def model_of(
    graph: Graph,
    shapes: Sequence[Sequence[int]],
    inputs: Sequence[str] | None = None,
    results: Sequence[str] | None = None,
    outside: Callable[[torch.Tensor], bool] = lambda constant: False,
) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """The model, and by name the constants that `outside` keeps out of it: whoever runs the model adds them."""
    graph = spell_bounds(graph)
    w, known = OnnxWriter(), known_of_all(graph, shapes)
    given = list(inputs or _numbered("input", len(graph.inputs)))
    wanted = list(results or _numbered("result", len(graph.results)))
    if len(given) != len(graph.inputs) or len(wanted) != len(graph.results):
        raise ValueError(
            f"names for {len(given)} inputs and {len(wanted)} results; "
            f"the graph has {len(graph.inputs)} and {len(graph.results)}"
        )
    for name in (*given, *wanted):
        if w.unique(name) != name:
            raise ValueError(f"two inputs or results are named {name!r}")

    values = _written(w, graph, known, given)
    _name_results(w, [values[node] for node in graph.results], wanted, given)
    w.forget_unused(wanted)
    placeholders = graph.calls.find_nodes(op="placeholder")
    declared = [w.information(name, values[node]) for name, node in zip(given, placeholders, strict=True)]
    answers = [w.information(name, known[node]) for name, node in zip(wanted, graph.results, strict=True)]
    beside = {name: constant for name, constant in w.constants.items() if outside(constant)}
    return w.model(declared, answers, beside), beside


def _numbered(name: str, count: int) -> Iterable[str]:
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]


def _written(w: OnnxWriter, graph: Graph, known: dict[fx.Node, Any], inputs: Sequence[str]) -> dict[fx.Node, Any]:
    """Writes every call. What each node is: an OnnxValue, a number that is known, or a list of these."""
    values: dict[fx.Node, Any] = {}
    names = iter(inputs)
    missing: dict[str, list[str]] = {}
    for node in graph.calls.nodes:
        if node.op == "placeholder":
            values[node] = _value(next(names), known[node])
        elif node.op == "get_attr":
            values[node] = w.constant(graph.constants[str(node.target)], str(node.target))
        elif node.op == "call_function" and not isinstance(known[node], KnownTensor | list):
            values[node] = known[node]
        elif node.op == "call_function":
            try:
                values[node] = _called(w, node, known[node], values)
            except NoOnnxForm as reason:
                missing.setdefault(str(reason), []).append(node.name)
                values[node] = _value(_nameless(known[node]), known[node])
    if missing:
        raise NoOnnxForm(
            "no form in ONNX for "
            + "; ".join(
                f"{reason} ({', '.join(nodes[:3])}{', ...' * (len(nodes) > 3)})" for reason, nodes in missing.items()
            )
        )
    return values


def _called(w: OnnxWriter, node: fx.Node, known: Any, values: dict[fx.Node, Any]) -> Any:
    target: Any = node.target
    name = NAMES.get(target, str(target))
    if name not in FORMS:
        raise NoOnnxForm(name)
    if target in MAKERS and not any(isinstance(values[size], OnnxValue) for size in node.all_input_nodes):
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        return w.constant(target(*args, **kwargs), node.name)
    members: list[Any] = [user.args[1] for user in node.users if user.users] if isinstance(known, list) else []
    w.begin(node.name, known, members)
    return _value(FORMS[name](w, *map_arg(_arguments(node), values.__getitem__)), known)


def _value(written: Any, known: Any) -> Any:
    if isinstance(known, list):
        return [_value(name, each) for name, each in zip(written, known, strict=True)]
    return OnnxValue(written, known.shape, known.dtype)


def _nameless(known: Any) -> Any:
    """Stands for the result of a call that could not be written, so that those after it are read too."""
    return [_nameless(each) for each in known] if isinstance(known, list) else ""


def _arguments(node: fx.Node) -> list[Any]:
    """In the operator's order, those with a default filled in: keyword arguments count as the others do."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        parameters = [(p.name, p.default_value if p.has_default_value() else None) for p in target._schema.arguments]
    elif node.kwargs:
        parameters = [(p.name, p.default) for p in inspect.signature(target).parameters.values()]
    else:
        return list(node.args)
    defaults = parameters[len(node.args) :]
    return [*node.args, *(node.kwargs.get(name, default) for name, default in defaults)]


def _name_results(w: OnnxWriter, values: Sequence[OnnxValue], names: Sequence[str], inputs: Sequence[str]) -> None:
    """A result that a node computes takes the name it shall have; what is an input, a constant or a result twice gets a
    node of its own.
    """
    renamed: dict[str, str] = {}
    for value, name in zip(values, names, strict=True):
        if value.name in renamed or value.name in w.constants or value.name in inputs:
            w.nodes.append(w.identity(value.name, name))
        else:
            renamed[value.name] = name
    for node in w.nodes:
        for names_of in (node.input, node.output):
            for i, name in enumerate(names_of):
                if name in renamed:
                    names_of[i] = renamed[name]
