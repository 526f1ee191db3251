"""The shapes of all values of a graph, and how each is laid out in memory, for inputs of given sizes.

Everything happens on meta tensors, which have shapes, strides and a storage to be views of, but no memory: neither the
weights nor sizes that a foreign file may name cost any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..graph import Graph
from ..operators import MAKERS, NAMES, OPERATORS
from ..plan import Ref, Step
from ..storage.schemas import by_name
from . import limits
from .demands import check_demands
from .shape_rules import given_by

# Operators that give images, wherever the result has four dimensions.
OF_IMAGES = re.compile(r"2d|upsample|pixel|channel_shuffle|(batch|group|instance)_norm|cnnfast\.(convolution|affine)")
# Beside the element-wise ones: what these are given is an image if what they give is one.
KEEPING = re.compile(
    r"cnnfast\.sum|aten\.(cat|chunk|split|tensor_split|slice|narrow|pad|roll|flip|to|repeat|expand)\b|getitem"
    r"|aten\.(hardswish|prelu|glu|log_sigmoid|rsub|masked_fill|where|softmax)\b"
)
LARGEST_NUMBER = 2**62


class Layouts:
    """The steps of a plan, in their order, and its values, by name.

    tensors: values on meta; views have one storage with what they are views of. roots: for each value, the one that its
    storage was made for. constants: the graph's, on meta, contiguous.
    """

    def __init__(self, inputs: dict[str, Tensor], constants: dict[str, Tensor]) -> None:
        self.most_bytes = limits.most_bytes(inputs.values(), constants.values())
        self.inputs = tuple(inputs)
        self.constants = constants
        self.results: tuple[str, ...] = ()
        self.steps: list[Step] = []
        self.tensors = {name: laid_out(tensor, image=True) for name, tensor in inputs.items()}
        self.roots = {name: name for name in inputs}
        self.images: set[str] = set()

    def call(self, step: Step) -> Any:
        """What the operator of a step gives, on meta."""
        args, kwargs = replaced((step.args, step.kwargs), lambda ref: self.tensor(ref.name))
        if OPERATORS[step.operator] in MAKERS:
            kwargs = {**kwargs, "device": torch.device("meta")}
        given = by_name(step.operator, args, kwargs)
        check_demands(step.operator, given)
        result = given_by(step.operator, given)
        return OPERATORS[step.operator](*args, **kwargs) if result is None else result

    def tensor(self, name: str) -> Tensor:
        """A value or a constant, on meta."""
        return self.tensors[name] if name in self.tensors else self.constants[name]

    def unused_name(self, name: str) -> str:
        while name in self.tensors or name in self.constants:
            name += "."
        return name

    def store(self, step: Step, tensors: Sequence[Tensor], image: bool) -> Step:
        """The step, with `tensors` as its outputs. Where they are not views of its arguments, memory is laid out for
        them.
        """
        storages = {_storage(self.tensors[name]): self.roots[name] for name in references(step) if name in self.roots}
        is_view = all(_storage(tensor) in storages for tensor in tensors)
        for name, tensor in zip(step.outputs, tensors, strict=True):
            self.tensors[name] = tensor if is_view else laid_out(tensor, image)
            self.roots[name] = storages[_storage(tensor)] if is_view else name
            if image:
                self.images.add(name)
        return replace(step, is_view=is_view)


def replaced(arguments: Any, by: Callable[[Ref], Any]) -> Any:
    """Arguments of a step, with something else for each Ref in them."""
    return map_aggregate(arguments, lambda argument: by(argument) if type(argument) is Ref else argument)


def references(step: Step) -> list[str]:
    """The names of the values and constants that a step takes."""
    found: list[str] = []
    replaced((step.args, step.kwargs), lambda ref: found.append(ref.name))
    return found


def laid_out(tensor: Tensor, image: bool) -> Tensor:
    """A dense tensor on meta of the same shape: channels_last for images, else in the order that PyTorch gave it."""
    if tensor.dim() == 4 and (image or tensor.is_contiguous(memory_format=torch.channels_last)):
        return torch.empty_like(tensor, memory_format=torch.channels_last)
    return torch.empty_like(tensor)


def propagate(graph: Graph, shapes: Sequence[Sequence[int]]) -> Layouts:
    """Raises ValueError where an operator does not take the sizes that follow from these."""
    constants = {name: torch.empty(c.shape, dtype=c.dtype, device="meta") for name, c in graph.constants.items()}
    names = {node: node.name if node.name not in constants else f"{node.name}." for node in graph.calls.nodes}
    placeholders = [node for node in graph.calls.nodes if node.op == "placeholder"]
    inputs = {
        names[node]: torch.empty(tuple(shape), dtype=taken.dtype, device="meta")
        for node, taken, shape in zip(placeholders, graph.inputs, shapes, strict=True)
    }
    layouts = Layouts(inputs, constants)
    images = _images(graph)
    stands_for: dict[fx.Node, Any] = {node: Ref(names[node]) for node in placeholders}
    with torch.no_grad():
        for node in graph.calls.nodes:
            if node.op == "get_attr":
                stands_for[node] = Ref(str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), stands_for.__getitem__)  # type: ignore[misc]
                pattern = node.meta.get("pattern", "")
                operator = NAMES[node.target]  # type: ignore[index]
                step = Step(node.name, operator, args, kwargs, (names[node],), pattern=pattern)
                try:
                    stands_for[node] = _add(layouts, step, node in images)
                except Exception as error:  # whatever an operator, or PyTorch's rule for its shapes, raises
                    raise ValueError(limits.refusal(graph, shapes, step, error)) from error
    layouts.results = tuple(stands_for[node].name for node in graph.results)
    return layouts


def _add(layouts: Layouts, step: Step, image: bool) -> Any:
    """Adds a step, and gives what stands for its result among the arguments of others: a Ref, a tuple of Refs, or a
    number, of which there is no step.
    """
    if step.operator == "python.getitem":
        return step.args[0][step.args[1]]
    given = layouts.call(step)
    if isinstance(given, (int, float)):
        if abs(given) > LARGEST_NUMBER:
            raise ValueError("it is a number above all sizes")
        return given
    several = not isinstance(given, Tensor)
    tensors = list(given) if several else [given]
    for tensor in tensors:
        if any(size < 0 for size in tensor.shape):  # PyTorch's rule for expand makes one of -1 and no dimension
            raise ValueError(f"it would have the shape {tuple(tensor.shape)}")
        if tensor.numel() * tensor.itemsize > layouts.most_bytes:
            raise ValueError(
                f"{tuple(tensor.shape)} has more bytes than the limit for inputs of these sizes, {layouts.most_bytes}"
            )
    if several:
        step = replace(step, outputs=tuple(f"{step.outputs[0]}.{i}" for i in range(len(tensors))))
    layouts.steps.append(layouts.store(step, tensors, image or bool(OF_IMAGES.search(step.operator))))
    refs = tuple(map(Ref, step.outputs))
    return refs if several else refs[0]


def _images(graph: Graph) -> set[fx.Node]:
    """The calls whose results, if they have four dimensions, are taken as images by the calls that use them."""
    found: set[fx.Node] = set()
    for node in reversed(graph.calls.nodes):
        for user in node.users:
            operator = NAMES.get(user.target, "")  # type: ignore[arg-type]
            keeps = KEEPING.search(operator) or torch.Tag.pointwise in getattr(user.target, "tags", ())
            if OF_IMAGES.search(operator) or (keeps and user in found):
                found.add(node)
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
