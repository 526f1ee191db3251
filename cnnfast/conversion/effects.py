"""What the nodes of a traced forward read and write, and so over which others a group of them may move.

There are two kinds of what can be read and written: the memory of tensors that arguments and results have, and the
state of modules, which is the storages of their parameters and buffers. Two results may share memory, and so may two
modules their state. Nothing moves over a stranger, a module whose code is not known: it may hold any other module in a
list, a closure or a global variable, and use it. Random numbers are no third kind: convolution, norm, sum and
activation draw none.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..nn.fused import HOOKS_OF_CALLS, forward_replaced
from .grafts import own_class
from .leaves import is_convolution, is_norm, normalizes_and_activates

IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
NEW_TENSORS = (torch.add, torch.cat, torch.concat, torch.stack)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
LIBRARY = ("torch.nn.", "cnnfast.nn")  # modules whose code is PyTorch's or ours

# Memory that somebody outside of the forward may know: its arguments, and whatever a stranger was given or has
# returned.
OUTSIDE = "outside"
# Memory that a stranger has returned: it may be the state of some module.
RETURNED = "returned"
# One of these, the memory that a node made, or the address of a storage that belongs to the state of a module.
Resource = fx.Node | str | int
Traits = tuple[tuple[type, bool], ...]


@dataclass(frozen=True)
class Conduct:
    """What calling a module may do with its arguments. Unless all its code is `known` it is a stranger, which may keep
    them, return them, and write them at a later call. `writes`: it may write into them now.
    """

    known: bool
    writes: bool


STRANGE = Conduct(known=False, writes=True)


@dataclass(frozen=True)
class Touched:
    """What a node reads and what it writes; `state` is the part of both that belongs to modules."""

    reads: frozenset[Resource] = frozenset()
    writes: frozenset[Resource] = frozenset()
    state: frozenset[Resource] = frozenset()

    def joined(self, other: Touched) -> Touched:
        return Touched(self.reads | other.reads, self.writes | other.writes, self.state | other.state)


@dataclass(frozen=True)
class Obstacle:
    """`mine` cannot be computed after `node`. why: "watched" (node is), "strange" (one of them is), "state" or "memory"
    (they share it).
    """

    node: fx.Node
    mine: fx.Node
    why: str


def traits(module: nn.Module) -> Traits:
    """What the effects of calling a module depend on and may be changed afterwards: of it and of all below it."""
    return tuple((own_class(m), bool(m.__dict__.get("inplace"))) for m in module.modules())


def buffers(modules: Iterable[nn.Module]) -> int:
    """How many buffers modules have among them: fewer than they had, if some share them now."""
    return len({id(t) for m in modules for t in m._buffers.values() if t is not None})


class Effects:
    """Of the nodes of a graph. `modules`: by the names that its nodes call them."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._conducts = {node: self._conduct(node) for node in graph.nodes if node.op == "call_module"}
        self._tensors: set[fx.Node] = set()  # whose results are a tensor in new memory
        self._memory: dict[fx.Node, frozenset[Resource]] = {}  # what a result, or what a list holds, may share
        self._groups: dict[fx.Node, Touched] = {}
        for node in graph.nodes:
            self._memory[node] = self._result(node)

    @property
    def conduct(self) -> Conduct:
        """Of the forward whose graph it is."""
        known = all(conduct.known for conduct in self._conducts.values())
        return Conduct(known, not known or any(OUTSIDE in self._shared(self._written(node)) for node in self._memory))

    def in_the_way(self, own: Sequence[fx.Node], last: fx.Node) -> Obstacle | None:
        """The first node that is not of `own` and keeps one of them from being computed in the place of `last`."""
        passing: list[fx.Node] = []
        node = own[0]
        while node is not last:
            if node in own:
                passing.append(node)
            elif found := next(
                (Obstacle(node, mine, why) for mine in passing if (why := self._why_before(node, mine, own))), None
            ):
                return found
            node = node.next
        return None

    def _why_before(self, node: fx.Node, mine: fx.Node, own: Sequence[fx.Node]) -> str:
        """Why `mine`, which is of `own`, has to be computed before `node`; the empty string if it need not."""
        if node.op == "call_module" and _is_watched(self._modules[str(node.target)]):
            return "watched"
        if self.is_stranger(node) or self.is_stranger(mine):
            return "strange"
        theirs, ours = self._touched(node), self._touched(mine, own)
        common = theirs.writes & (ours.reads | ours.writes) | theirs.reads & ours.writes
        if common:
            return "state" if common & ours.state else "memory"
        if ours.state and (
            RETURNED in theirs.writes or (RETURNED in theirs.reads and ours.writes and not self._takes_images(node))
        ):
            return "state"
        return ""

    def rests_on(self, own: Sequence[fx.Node]) -> list[str]:
        """Paths of the modules that have to stay as they are, and unwatched, so that `own` may be computed in the place
        of its last: those called in between, and those whose results count as new memory. Empty if nothing is in
        between.
        """
        between = self.passed(own)
        called = [
            n for n in self._memory if n.op == "call_module" and n not in own and (n in between or n in self._tensors)
        ]
        return [str(n.target) for n in called] if between else []

    def passed(self, own: Sequence[fx.Node]) -> set[fx.Node]:
        """What is not of `own` and stands between the first and the last of them."""
        node, between = own[0], set()
        while node is not own[-1]:
            between |= {node} - set(own)
            node = node.next
        return between

    def replace(self, own: Sequence[fx.Node], group: fx.Node) -> None:
        """From now on `group` does what `own` did, in the place of the last of them."""
        self._groups[group] = functools.reduce(Touched.joined, (self._touched(node, own) for node in own))
        self._memory[group] = self._memory[own[-1]]
        if any(map(self.is_stranger, own)):
            self._conducts[group] = STRANGE
        for node in own:
            del self._memory[node]

    def _touched(self, node: fx.Node, own: Sequence[fx.Node] = ()) -> Touched:
        """Of a node that calls no stranger; apart from the results of `own`, which nobody else knows."""
        if node in self._groups or node.op == "get_attr":  # the members that the call of a group names
            return self._groups.get(node, Touched())
        given = self._shared(a for a in node.all_input_nodes if a not in own)
        written = self._shared(a for a in self._written(node) if a not in own)
        if node.op != "call_module":
            return Touched(given, written)
        module = self._modules[str(node.target)]
        buffers: frozenset[Resource] = frozenset(map(_storage, module.buffers()))
        state = buffers.union(map(_storage, module.parameters()))
        return Touched(given | state, written | buffers, state)

    def is_stranger(self, node: fx.Node) -> bool:
        """Whether a node calls a module, or stands for a group with one, of which not all code is known."""
        return node in self._conducts and not self._conducts[node].known

    def _takes_images(self, node: fx.Node) -> bool:
        """Whether what it reads has too many axes to be a norm's statistics."""
        return node in self._groups or (node.op == "call_module" and node in self._tensors)

    # Memory

    def _shared(self, nodes: Iterable[fx.Node]) -> frozenset[Resource]:
        return frozenset().union(*(self._memory[node] for node in nodes))

    def _result(self, node: fx.Node) -> frozenset[Resource]:
        """The memory that a result may share."""
        if node.op == "placeholder":
            return frozenset([OUTSIDE])
        if self._is_new_tensor(node):
            self._tensors.add(node)
            return frozenset([node])
        given = self._shared(node.all_input_nodes)
        if self.is_stranger(node):
            self._mix(given | {OUTSIDE})
            given |= {OUTSIDE, RETURNED}
        elif node.target is operator.iadd and node.args[0] not in self._tensors:  # a list holds what was added to it
            self._mix(given)
        return given | {node}

    def _mix(self, resources: frozenset[Resource]) -> None:
        """What may be one of these may from now on be any of them."""
        for node, memory in self._memory.items():
            if memory & resources:
                self._memory[node] = memory | resources

    def _is_new_tensor(self, node: fx.Node) -> bool:
        """Whether a result is certainly a tensor in memory of its own. Much that looks like it may return its argument:
        identities, dropout, flatten, contiguous, to, activations in place; and a sum may be of two lists, and hold what
        they held.
        """
        if node.kwargs.get("out") is not None:
            return False
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            if forward_replaced(module):
                return False
            if isinstance(module, POOLS) and type(module).__module__.startswith(LIBRARY):
                return not getattr(module, "return_indices", False)
            return is_convolution(module) or (is_norm(module) and not normalizes_and_activates(module))
        if node.op == "call_method":
            return node.target == "add"
        if node.target is operator.add:
            return any(a in self._tensors if isinstance(a, fx.Node) else isinstance(a, int | float) for a in node.args)
        return node.op == "call_function" and node.target in NEW_TENSORS

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """The nodes into whose results a node may write, if it calls no stranger."""
        first = [*node.args, *node.kwargs.values()][:1]
        if node.op == "call_module":
            written: Any = node.all_input_nodes if self._conducts[node].writes else []
        elif node.op == "call_method":
            written = first if str(node.target).endswith("_") else []
        else:
            written = first if node.target in IN_PLACE_OPERATORS or node.kwargs.get("inplace") else []
        found: list[fx.Node] = []
        map_arg([*written, node.kwargs.get("out")], found.append)  # `out` may be a list
        return found

    # Modules

    def _conduct(self, node: fx.Node) -> Conduct:
        tensors = not node.kwargs and all(isinstance(a, fx.Node | list | tuple) for a in node.args)
        return _conduct_of(self._modules[str(node.target)], len(node.args) if tensors else None)


def _conduct_of(module: nn.Module, arguments: int | None) -> Conduct:
    """Of a call with so many arguments, each of them a tensor or a list; None if it has others, or names them."""
    if forward_replaced(module):
        return STRANGE
    found = vars(type(module)).get("_cnnfast_plan")
    if found is not None:  # its code was traced, for certain arguments
        conducts = [v.conduct for v in found.variants if v.kinds == ("any",) * (arguments or 0)]
        if "_cnnfast_changed" in module.__dict__:
            return STRANGE
        return Conduct(all(c.known for c in conducts), any(c.writes for c in conducts)) if conducts else STRANGE
    if not (type(module).__module__.startswith(LIBRARY) or is_convolution(module) or is_norm(module)):
        return STRANGE
    below = [_conduct_of(child, arguments) for child in module.children()]
    return Conduct(all(c.known for c in below), bool(module.__dict__.get("inplace")) or any(c.writes for c in below))


def _is_watched(module: nn.Module) -> bool:
    """Whether it or a module below has hooks, which may do anything, or a forward that was put on the instance."""
    return any(forward_replaced(m) or any(m.__dict__.get(hooks) for hooks in HOOKS_OF_CALLS) for m in module.modules())


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # tensors that have none, or not yet
        return id(tensor)
