"""What the nodes of a traced forward read and write, and so past which other nodes a group of them may be moved.

Two kinds of things are read and written: the memory of arguments and results, and the state of modules, which is the
storages of their parameters and buffers. Two results may share memory, and two modules may share state. Nothing is
moved past a stranger, that is a module whose code is not known: it may hold any other module, in a list, a closure or a
global variable, and use it. Random numbers need no third kind, because convolution, norm, sum and activation draw none.
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
from ..patterns import activation_of
from .grafts import own_class
from .leaves import is_convolution, is_norm, normalizes_and_activates

IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
NEW_TENSORS = (torch.add, torch.cat, torch.concat, torch.stack)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
LIBRARY = ("torch.nn.", "cnnfast.nn")  # where the classes are whose code is PyTorch's or ours

# Memory that code outside of the forward may know: its arguments, and whatever a stranger was given or has returned.
OUTSIDE = "outside"
# Memory that a stranger has returned. It may be the state of some module.
RETURNED = "returned"
# What is read and written: one of these two, the memory that a node made, or a storage of a module's state by address.
Resource = fx.Node | str | int
Traits = tuple[tuple[type, bool], ...]


@dataclass(frozen=True)
class Conduct:
    """What calling a module may do with its arguments.

    known: all its code is known. Otherwise the module is a stranger, which may keep its arguments, return them, and
    write into them at a later call. writes: this call may write into them.
    """

    known: bool
    writes: bool


STRANGE = Conduct(known=False, writes=True)


@dataclass(frozen=True)
class Touched:
    """What a node reads and what it writes. state: whatever of these two belongs to modules."""

    reads: frozenset[Resource] = frozenset()
    writes: frozenset[Resource] = frozenset()
    state: frozenset[Resource] = frozenset()

    def joined(self, other: Touched) -> Touched:
        return Touched(self.reads | other.reads, self.writes | other.writes, self.state | other.state)


@dataclass(frozen=True)
class Obstacle:
    """Why `mine`, a node of a group, cannot be computed after `node`, which is not of the group.

    why: "watched" (hooks see the call of `node`), "strange" (one of the two is a stranger), "state" or "memory" (both
    touch it, and one writes it).
    """

    node: fx.Node
    mine: fx.Node
    why: str


def traits(module: nn.Module) -> Traits:
    """What the effects of calling a module depend on, and what may change after a conversion: the class and the flag
    `inplace` of the module and of all below it.
    """
    return tuple((own_class(m), bool(m.__dict__.get("inplace"))) for m in module.modules())


def buffers(modules: Iterable[nn.Module]) -> int:
    """How many different buffers the modules have. Once some of them come to share one, it is fewer than before."""
    return len({id(t) for m in modules for t in m._buffers.values() if t is not None})


class Effects:
    """The effects of all nodes of a graph. modules: by the names that its nodes call them."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._conducts = {node: self._conduct(node) for node in graph.nodes if node.op == "call_module"}
        self._tensors: set[fx.Node] = set()  # the nodes whose result is a tensor in new memory
        self._memory: dict[fx.Node, frozenset[Resource]] = {}  # what each result, or what is in a list, may share
        self._groups: dict[fx.Node, Touched] = {}  # what the nodes did that a group has replaced
        for node in graph.nodes:
            self._memory[node] = self._result(node)

    @property
    def conduct(self) -> Conduct:
        """What calling the container whose forward this is may do with its arguments."""
        known = all(conduct.known for conduct in self._conducts.values())
        return Conduct(known, not known or any(OUTSIDE in self._shared(self._written(node)) for node in self._memory))

    def in_the_way(self, own: Sequence[fx.Node], last: fx.Node) -> Obstacle | None:
        """The first node between those of `own` that keeps one of them from being computed in the place of `last`."""
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
        """Why `mine`, one of `own`, has to be computed before `node`; the empty string if it need not be."""
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
        """The paths of the modules that have to stay as they are, and without hooks, so that `own` may be computed in
        the place of its last: those called in between, and those whose results were taken for new memory. Empty if
        nothing stands in between.
        """
        between = self.passed(own)
        called = [
            n for n in self._memory if n.op == "call_module" and n not in own and (n in between or n in self._tensors)
        ]
        return [str(n.target) for n in called] if between else []

    def passed(self, own: Sequence[fx.Node]) -> set[fx.Node]:
        """The nodes between the first and the last of `own` that are not of them."""
        node, between = own[0], set()
        while node is not own[-1]:
            between |= {node} - set(own)
            node = node.next
        return between

    def replace(self, own: Sequence[fx.Node], group: fx.Node) -> None:
        """The node `group` replaces those of `own`: it does all that they did, in the place of the last of them."""
        self._groups[group] = functools.reduce(Touched.joined, (self._touched(node, own) for node in own))
        self._memory[group] = self._memory[own[-1]]
        if any(map(self.is_stranger, own)):
            self._conducts[group] = STRANGE
        for node in own:
            del self._memory[node]

    def _touched(self, node: fx.Node, own: Sequence[fx.Node] = ()) -> Touched:
        """What a node touches, if it calls no stranger. The results of `own` are left out: no other node uses them."""
        if node in self._groups or node.op == "get_attr":  # get_attr names the members for the call of a group
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
        """Whether a node calls a module of which not all code is known, or stands for a group with such a module."""
        return node in self._conducts and not self._conducts[node].known

    def _takes_images(self, node: fx.Node) -> bool:
        """Whether a node is known to read images, which have too many axes to be the statistics of a norm."""
        return node in self._groups or (node.op == "call_module" and node in self._tensors)

    # The memory of results

    def _shared(self, nodes: Iterable[fx.Node]) -> frozenset[Resource]:
        return frozenset().union(*(self._memory[node] for node in nodes))

    def _result(self, node: fx.Node) -> frozenset[Resource]:
        """The memory that the result of a node may share, by what is known of the nodes before it."""
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
        """From now on, whatever may share one of these resources may share any of them."""
        for node, memory in self._memory.items():
            if memory & resources:
                self._memory[node] = memory | resources

    def _is_new_tensor(self, node: fx.Node) -> bool:
        """Whether the result of a node is certainly a tensor in memory of its own.

        Many operations may return their argument: identities, dropout, flatten, contiguous, to, and activations in
        place. And what looks like a sum may be two lists, joined to one that holds what they held.
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
        """The nodes into whose results a node writes, unless it calls a stranger, which may write into others too."""
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

    # The conduct of modules

    def _conduct(self, node: fx.Node) -> Conduct:
        tensors = not node.kwargs and all(isinstance(a, fx.Node | list | tuple) for a in node.args)
        return _conduct_of(self._modules[str(node.target)], len(node.args) if tensors else None)


def _conduct_of(module: nn.Module, arguments: int | None) -> Conduct:
    """What a call of a module may do. arguments: how many it has, if they are tensors or lists and given by position;
    otherwise None.
    """
    if forward_replaced(module):
        return STRANGE
    found = vars(type(module)).get("_cnnfast_plan")
    if found is not None:  # a fused container: its code was traced, for certain arguments
        conducts = [v.conduct for v in found.variants if v.kinds == ("any",) * (arguments or 0)]
        if "_cnnfast_changed" in module.__dict__:
            return STRANGE
        return Conduct(all(c.known for c in conducts), any(c.writes for c in conducts)) if conducts else STRANGE
    known = is_convolution(module) or is_norm(module) or activation_of(module)
    if not (known or type(module).__module__.startswith(LIBRARY)):
        return STRANGE
    below = [_conduct_of(child, arguments) for child in module.children()]
    return Conduct(all(c.known for c in below), bool(module.__dict__.get("inplace")) or any(c.writes for c in below))


def _is_watched(module: nn.Module) -> bool:
    """Whether a module or one below it has hooks, which may do anything, or a forward that was put on the instance."""
    return any(forward_replaced(m) or any(m.__dict__.get(hooks) for hooks in HOOKS_OF_CALLS) for m in module.modules())


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # a tensor that has no storage, or not yet
        return id(tensor)
