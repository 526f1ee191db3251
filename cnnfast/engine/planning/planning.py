"""From a graph and the sizes of its inputs to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..graph import Graph
from ..plan import Buffer, Piece, Plan, Ref, Step, Value
from . import limits, sharing
from .arena import Lifetime, arrange
from .propagation import Layouts, propagate, references


def plan(graph: Graph, shapes: Sequence[Sequence[int]]) -> Plan:
    """What the graph does with inputs of these shapes, and where each value lies. Raises ValueError for shapes that the
    graph does not take, and for sizes that need more memory than inputs and constants justify (limits.most_bytes).
    """
    limits.check(graph, shapes)
    layouts = propagate(graph, shapes)
    places = sharing.concatenate_in_place(layouts)
    _copy_results(layouts)
    lives = _Lives(layouts)
    steps = [replace(step, overwrites=lives.write_over(index, step)) for index, step in enumerate(layouts.steps)]
    steps = [_with_pieces(layouts, step, places) if step.operator == sharing.CONCATENATION else step for step in steps]
    buffers, arena = lives.buffers()
    needed = arena + sum(b.bytes for b in buffers.values() if b.address is None and b.name not in layouts.inputs)
    if needed > layouts.most_bytes:
        raise ValueError(
            f"inputs of the shapes {', '.join(map(str, map(tuple, shapes)))} would need {needed} bytes for values, and "
            f"the limit for inputs of these sizes is {layouts.most_bytes}: take a smaller batch"
        )
    values = {name: _value(layouts, name, name, tensor) for name, tensor in layouts.tensors.items()}
    return Plan(layouts.inputs, tuple(steps), layouts.results, values, buffers, arena)


def _copy_results(layouts: Layouts) -> None:
    """Adds a copy of every result that does not fill memory of its own."""
    copies: dict[str, str] = {}
    for name in dict.fromkeys(layouts.results):
        root = layouts.roots.get(name)
        if root is None or root in layouts.inputs or not _fills(layouts.tensors[name], layouts.tensors[root]):
            copies[name] = layouts.unused_name(f"{name}.copy")
            step = Step(copies[name], "aten.clone.default", (Ref(name),), {}, (copies[name],))
            layouts.steps.append(layouts.store(step, [layouts.call(step)], name in layouts.images))
    layouts.results = tuple(copies.get(name, name) for name in layouts.results)


def _fills(view: Tensor, whole: Tensor) -> bool:
    """Whether each element of the whole is exactly one of the view."""
    dense = torch.empty_like(view).stride() == view.stride()  # it keeps strides that have neither gaps nor overlaps
    return dense and view.nbytes == whole.nbytes


def _with_pieces(layouts: Layouts, step: Step, places: dict[str, tuple[str, int]]) -> Step:
    """A concatenation, with the parts that it has to copy."""
    output, dim = step.outputs[0], step.args[1]
    pieces = []
    for name, start in sharing.starts(layouts, step):
        if places.get(name) != (output, start):
            end = start + layouts.tensor(name).shape[dim]
            place = layouts.tensors[output].narrow(dim, start, end - start)
            pieces.append(Piece(name, _value(layouts, f"{output}[{start}:{end}]", output, place)))
    return replace(step, pieces=tuple(pieces), is_view=not pieces)


def _value(layouts: Layouts, name: str, within: str, tensor: Tensor) -> Value:
    buffer, offset = layouts.roots[within], int(tensor.storage_offset())
    return Value(name, tuple(tensor.shape), tensor.stride(), tensor.dtype, buffer, offset)


class _Lives:
    """When the memory of each root is in use: the first and the last step."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self.first = dict.fromkeys(layouts.inputs, 0)
        self.last = dict.fromkeys(layouts.inputs, 0)
        for index, step in enumerate(layouts.steps):
            for name in (*step.outputs, *references(step)):
                if name in layouts.roots:
                    self.first.setdefault(layouts.roots[name], index)
                    self.last[layouts.roots[name]] = index
        self.kept = {layouts.roots[name] for name in layouts.results}  # they belong to the caller
        self.last |= dict.fromkeys(self.kept, len(layouts.steps))

    def write_over(self, index: int, step: Step) -> str:
        """Gives the output of a step the memory of an argument that ends with this step, and the name of this argument;
        the empty string, where there is none.
        """
        layouts, output = self.layouts, step.outputs[0]
        if layouts.roots[output] != output or self.first[output] != index or step.is_view:
            return ""
        for name in sharing.written_over(layouts, step):
            root = layouts.roots[name]
            fills = layouts.tensors[root].nbytes == layouts.tensors[output].nbytes
            if fills and self.last[root] == index and root not in layouts.inputs:
                self._merge(output, root)
                return name
        return ""

    def _merge(self, later: str, earlier: str) -> None:
        roots = self.layouts.roots
        roots |= {name: earlier for name, root in roots.items() if root == later}
        self.last[earlier] = self.last.pop(later)
        del self.first[later]
        if later in self.kept:
            self.kept.add(earlier)

    def buffers(self) -> tuple[dict[str, Buffer], int]:
        """By name, and the bytes of the arena that holds those that are neither an input's nor a result's."""
        outside = {*self.layouts.inputs, *self.kept}
        size = {root: self.layouts.tensors[root].nbytes for root in self.first}
        inside = [root for root in self.first if root not in outside]
        found, arena = arrange([Lifetime(size[root], self.first[root], self.last[root]) for root in inside])
        address = dict(zip(inside, found, strict=True))
        return {
            root: Buffer(root, size[root], first, self.last[root], address.get(root))
            for root, first in self.first.items()
        }, arena
