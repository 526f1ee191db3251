"""From a module to a graph, by torch.export: the only file that knows it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

from ..graph import Graph, Input
from ..operators import NAMES, CannotCapture, why_not
from ..planning.conditions import fixed_size, violated
from ..structures import Structure
from .aliasing import drop_dropout, drop_writes_to_inputs, make_functional
from .cleaning import clean
from .giving_up import within
from .guards import PYTORCH, conditions_of, decisions
from .inlining import inline

_one_at_a_time = threading.Lock()  # torch.export keeps what it is about in variables of the process


@dataclass(frozen=True)
class CapturedNetwork:
    """A graph of flat inputs and results, and the structures that they are taken from and put into."""

    graph: Graph
    arguments: Structure
    result: Structure


def capture(model: nn.Module, inputs: tuple[Any, ...], *, sizes: bool) -> CapturedNetwork:
    """The graph of a module in eval mode on the CPU, called with these positional arguments, for any batch size. sizes:
    for any height and width too. The module is not changed, but the graph's constants are its parameters and buffers.

    Raises CannotCapture; ValueError for arguments that are not tensors, constants, and tuples, lists and dicts of such.
    """
    with _one_at_a_time:
        return _capture(model, inputs, sizes)


def capture_within(model: nn.Module, inputs: tuple[Any, ...], seconds: float = 60.0) -> CapturedNetwork | str:
    """The graph for any height and width, or a sentence that says why there is none. torch.export's algebra takes
    minutes for some networks, such as Swin Transformers: it is given up after so many seconds.
    """
    try:
        with _one_at_a_time:
            captured = within(seconds, lambda: _capture(model, inputs, True))
    except TimeoutError:
        return f"torch.export was not done with other image sizes within {seconds:g} seconds"
    except ValueError as error:
        return str(error)
    sizes = [size for given in captured.graph.inputs if len(given.shape) > 2 for size in given.shape[2:]]
    if sizes and None not in sizes:
        return f"the network's code allows for images of {' x '.join(map(str, sizes))} only"
    return captured


def _capture(model: nn.Module, inputs: tuple[Any, ...], sizes: bool) -> CapturedNetwork:
    leaves, arguments = Structure.flatten(inputs)
    images = max(leaves, key=Tensor.dim, default=torch.tensor(0))  # the others are features, masks, scales
    batch = images.shape[0] if images.dim() else 0
    with _quietly():
        if batch == 1:  # torch.export takes a size of 1 for a constant
            doubled = [torch.cat([leaf, leaf]) if leaf.dim() and leaf.shape[0] == 1 else leaf for leaf in leaves]
            with contextlib.suppress(CannotCapture):
                captured = _traced(model, doubled, arguments, 2, sizes)
                free = all(not given.shape or given.shape[0] is None for given in captured.graph.inputs)
                if free and not violated(captured.graph.conditions, [tuple(leaf.shape) for leaf in leaves]):
                    return captured
        return _traced(model, leaves, arguments, batch, sizes)


class _Flat(nn.Module):
    """The module with tensors as arguments and a tuple of tensors as result, which torch.export takes whatever the
    classes of arguments and results are.
    """

    def __init__(self, network: nn.Module, arguments: Structure, results: list[Structure]) -> None:
        super().__init__()
        self.network, self.arguments = network, arguments
        self.note_result = results.append  # torch.export takes back what is assigned to an attribute meanwhile

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        try:
            given = self.network(*self.arguments.build(leaves))
        except GuardOnDataDependentSymNode as error:
            text = "a decision in its code depends on the values in a tensor"
            raise CannotCapture(text + _line_of(error)) from error
        except Exception as error:
            raise CannotCapture(_reason(error) + _line_of(error)) from error
        tensors, result = Structure.flatten(given)
        self.note_result(result)
        return tuple(tensors)


PREFIX = "network."  # of the names of parameters, by the class above


def _traced(model: nn.Module, leaves: list[Tensor], arguments: Structure, batch: int, sizes: bool) -> CapturedNetwork:
    results: list[Structure] = []
    flat = _Flat(model, arguments, results)
    flat.training = False
    free = tuple(_free_dimensions(leaf, batch, sizes) for leaf in leaves)
    try:
        with decisions() as noted:
            exported = torch.export.export(flat, tuple(leaves), dynamic_shapes=(free,), strict=False)
    except CannotCapture:
        raise
    except ValueError as error:  # a result without a structure
        raise CannotCapture(str(error).split("\n")[0]) from error
    except Exception as error:
        raise CannotCapture(_reason(error)) from error
    for part in exported.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            drop_dropout(part.graph)
    calls, module = _unpacked(exported)
    if not make_functional(calls):
        calls, module = _unpacked(exported.run_decompositions({}))
        drop_writes_to_inputs(calls)
    constants = _constants(calls, module)
    clean(calls, constants)
    placeholders = [node for node in calls.nodes if node.op == "placeholder"]
    for node in calls.nodes:
        if node.op == "call_function":
            _admit(node)
    found = conditions_of(placeholders, calls, noted)
    fixed = {size[:2]: size[2] for size in map(fixed_size, found) if size}
    inputs = tuple(
        Input(name, _shape(node, index, fixed), leaf.dtype)
        for index, (name, node, leaf) in enumerate(zip(_names(model, arguments), placeholders, leaves, strict=True))
    )
    kept = tuple(condition for condition in found if not fixed_size(condition))
    graph = Graph(_plain_copy(calls, inputs), constants, inputs, kept)
    graph.prune()
    return CapturedNetwork(graph, arguments, results[-1])


def _shape(placeholder: fx.Node, index: int, fixed: dict[tuple[int, int], int]) -> tuple[int | None, ...]:
    """Sizes that torch.export has fixed, in the shape itself or by a condition, and None for others."""
    sizes = enumerate(placeholder.meta["val"].shape)
    return tuple(size if isinstance(size, int) else fixed.get((index, dim)) for dim, size in sizes)


def _unpacked(exported: torch.export.ExportedProgram) -> tuple[fx.Graph, nn.Module]:
    module = exported.module(check_guards=False)
    inline(module.graph, module)
    return module.graph, module


def _admit(node: fx.Node) -> None:
    if node.target not in NAMES:
        raise CannotCapture(why_not(node.target) + _where(node))
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    if any(isinstance(one, Tensor) and free_unbacked_symbols(one) for one in values):
        raise CannotCapture(f"the shape of a result of {node.target} depends on the values in a tensor{_where(node)}")


def _where(node: fx.Node) -> str:
    """The line of the model's code that a call comes from, which is the last of its trace."""
    lines = re.findall(r'File "(.*?)", line (\d+)', node.meta.get("stack_trace") or "")
    return " ({}, line {})".format(*lines[-1]) if lines else ""


def _plain_copy(calls: fx.Graph, inputs: Sequence[Input]) -> fx.Graph:
    """The graph with placeholders named as the inputs, and without what torch.export knows about each node: the path
    of the module that a node comes from is all that is kept, as meta["module"].
    """
    copied, values = fx.Graph(), {}
    given = iter(inputs)
    for node in calls.nodes:
        if node.op == "placeholder":
            values[node] = copied.placeholder(next(given).name)
        elif node.op == "output":
            copied.output(tuple(values[result] for result in node.args[0]))
        else:
            values[node] = copied.node_copy(node, values.__getitem__)
            values[node].meta = {"module": _module_path(node)}
    return copied


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix(PREFIX.rstrip(".")).removeprefix(".")


def _free_dimensions(leaf: Tensor, batch: int, sizes: bool) -> dict[int, Any]:
    free = [0] if leaf.dim() and leaf.shape[0] == batch and batch > 1 else []
    if sizes and leaf.dim() >= 3:
        free += [dim for dim in range(2, leaf.dim()) if leaf.shape[dim] > 1]
    return dict.fromkeys(free, torch.export.Dim.AUTO)


def _constants(calls: fx.Graph, module: nn.Module) -> dict[str, Tensor]:
    constants: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # tied parameters are one constant
    for node in calls.nodes:
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(module)
            if not isinstance(value, Tensor):  # such as a random number generator: what is called with it is refused
                continue
            name = names.setdefault(id(value), str(node.target).removeprefix(PREFIX))
            constants[name] = value.detach()
            node.target = name
    return constants


def _names(model: nn.Module, arguments: Structure) -> list[str]:
    """A name for each tensor of the arguments: that of forward's parameter where the argument is a tensor itself."""
    given = [one.name for one in inspect.signature(model.forward).parameters.values() if one.kind <= 1]
    names: list[str] = []

    def walk(structure: Structure, name: str) -> None:
        if structure.kind == "tensor":
            name = re.sub(r"\W", "_", name)
            names.append(name if name not in names else f"{name}_{len(names)}")
        for index, part in enumerate(structure.parts):
            walk(part, f"{name}_{structure.keys[index] if structure.keys else index}")

    for index, part in enumerate(arguments.parts):
        walk(part, given[index] if index < len(given) else f"input_{index}")
    return names


def _reason(error: Exception) -> str:
    return f"torch.export fails with {type(error).__name__}: {str(error).strip().split(chr(10))[0]:.300}"


def _line_of(error: Exception) -> str:
    """The last line that is not PyTorch's own of those that led to an error."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    ours = [frame for frame in frames if not frame.filename.startswith(PYTORCH)]
    return f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else ""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.export warns of and logs: it concerns its developers, and what matters is raised. Without the
    caller's modes, too, which would find their way into the graph.
    """
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")]
    enabled = [logger for logger in loggers if not logger.disabled]
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")
        for logger in enabled:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in enabled:
                logger.disabled = False
