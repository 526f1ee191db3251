"""Finds residual blocks among the groups of a fused forward, by what they compute and not by class: two or three groups
of convolution, norm and ReLU, one after the other, to whose result their input is added, or a convolution and a norm of
it. In training such a block is one operator (nn/residual.py); everywhere else, and where a hook or a module of another
kind is in the way, its groups are called one by one.

Between the groups of a block stands nothing that is not part of it, so that their order is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from ..nn.residual import layer_of
from ..patterns import activation_of, addition, called_activation
from .grafts import base_of

# What a generated forward calls for a group, or for a block (calling.py).
Call = Callable[..., Tensor]
LONGEST, SHORTEST = 3, 2  # groups of a branch


class _Found(NamedTuple):
    """The nodes of a block: its groups in their order, the identities that are called before each, its input, what
    calls the shortcut, if anything does, and all that it takes the place of.
    """

    steps: list[fx.Node]
    before: list[list[fx.Node]]
    x: fx.Node
    shortcut: fx.Node | None
    inside: set[fx.Node]


def join_blocks(
    graph: fx.Graph, modules: Mapping[str, nn.Module], call: Call, block: Call, less_memory: bool
) -> list[tuple[str, str]]:
    """Puts one call of `block` into the graph for each residual block of calls of `call`. Returns of each sum that a
    ReLU follows the path of what gave the branch's result: of a group's convolution, or of another module; and why it
    ends no block, or the empty string if it does.
    """
    ends = _other_sums(graph, modules, call)
    for node in list(graph.nodes):
        if _is_group(node, call) and node.args[3] is not None and _is_relu(node, modules):
            found = _block_that_ends(node, modules, call)
            ends.append((str(node.args[0].target), found if isinstance(found, str) else ""))
            if not isinstance(found, str):
                _join(graph, found, block, less_memory)
    return ends


def is_one_block(graph: fx.Graph, block: Call) -> bool:
    """Whether a graph is one call of `block` of its one argument, and nothing else."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    if [node.op for node in nodes] != ["placeholder", "call_function", "output"]:
        return False
    argument, called, output = nodes
    return called.target is block and called.args[0] is argument and output.args[0] is called


def _other_sums(graph: fx.Graph, modules: Mapping[str, nn.Module], call: Call) -> list[tuple[str, str]]:
    """As join_blocks returns them, the sums to which another module stands between a group and the sum, as where a
    branch ends in squeeze-and-excitation.
    """
    ends = []
    for node in graph.nodes:
        found = addition(node)
        if found is None or len(node.users) != 1 or not _activates(next(iter(node.users)), modules):
            continue
        for branch in (found.left, found.right):
            called = isinstance(branch, fx.Node) and branch.op == "call_module"
            inside = next(iter((*branch.args, *branch.kwargs.values())), None) if called else None
            if _is_group(inside, call):
                path = str(branch.target)
                ends.append((path, f"{path} stands between the last norm and the sum"))
                break
    return ends


def _activates(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node calls a ReLU by itself."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    known = called_activation(node) if module is None else activation_of(module)
    return known is not None and known[0] == "relu"


def _is_group(node: Any, call: Call) -> bool:
    """Whether a node calls a convolution and a norm, and no pool."""
    return isinstance(node, fx.Node) and node.target is call and None not in node.args[:2] and len(node.args) == 7


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    activation = node.args[5]
    if isinstance(activation, fx.Node):
        known = activation_of(modules[str(activation.target)])
        return known is not None and known[0] == "relu"
    return activation == "relu"


def _without_identities(node: Any, modules: Mapping[str, nn.Module]) -> tuple[Any, list[fx.Node]]:
    """(what a node is computed from, before identities that nobody else reads; these identities in their order)."""
    passed: list[fx.Node] = []
    while _calls(node, modules, nn.Identity) and len(node.args) == 1 and len(node.users) == 1:
        passed.insert(0, node)
        node = node.args[0]
    return node, passed


def _calls(node: Any, modules: Mapping[str, nn.Module], kind: type[nn.Module]) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs:
        return False
    return base_of(type(modules[str(node.target)])) is kind


def _block_that_ends(last: fx.Node, modules: Mapping[str, nn.Module], call: Call) -> _Found | str:
    """The block whose last group this is, or why there is none."""
    x, passed = _without_identities(last.args[2], modules)
    steps, before = [last], [passed]
    shortcut, source = _shortcut(last.args[3], modules, call)
    while x is not source:
        if not _is_group(x, call) or len(x.users) > 1 or x.args[3] is not None or not _is_relu(x, modules):
            return (
                "what is added is not its branch's input, or a convolution and a norm of it, or the branch is not made"
                " of convolutions, each with a norm and ReLU"
            )
        if len(steps) == LONGEST:
            return f"its branch has more than {LONGEST} convolutions"
        steps.insert(0, x)
        x, passed = _without_identities(x.args[2], modules)
        before.insert(0, passed)
    if len(steps) < SHORTEST:
        return "its branch has one convolution"
    inside = {*steps, *(node for nodes in before for node in nodes), *([] if shortcut is None else [shortcut])}
    if not _alone(inside, last):
        return "something else is computed between its members"
    return _Found(steps, before, x, shortcut, inside)


def _shortcut(residual: Any, modules: Mapping[str, nn.Module], call: Call) -> tuple[fx.Node | None, Any]:
    """(the node that adapts a block's input, if one does; that input)."""
    if not isinstance(residual, fx.Node) or len(residual.users) != 1:
        return None, residual
    if _calls(residual, modules, nn.Sequential) and layer_of(modules[str(residual.target)]) is not None:
        return residual, residual.args[0] if len(residual.args) == 1 else None
    if _is_group(residual, call) and residual.args[3] is None and residual.args[5] is None:
        return residual, residual.args[2]
    return None, residual


def _alone(inside: set[fx.Node], last: fx.Node) -> bool:
    """Whether no other node stands among these, but for those that name a module."""
    missing, node = set(inside), last
    while missing:
        if node.op != "get_attr" and node not in inside:
            return False
        missing.discard(node)
        node = node.prev
    return True


def _join(graph: fx.Graph, found: _Found, block: Call, less_memory: bool) -> None:
    last = found.steps[-1]
    with graph.inserting_before(last):
        before = [tuple(graph.get_attr(str(node.target)) for node in nodes) for nodes in found.before]
        steps = tuple((*step.args[:2], *step.args[5:], nodes) for step, nodes in zip(found.steps, before, strict=True))
        shortcut = found.shortcut
        if shortcut is not None:
            sequential = shortcut.op == "call_module"
            shortcut = graph.get_attr(str(shortcut.target)) if sequential else shortcut.args[:2]  # pyright: ignore
        joined = graph.call_function(block, (found.x, steps, shortcut, last.args[4], less_memory))
    joined.meta["named"] = last.meta["named"]
    last.replace_all_uses_with(joined)
    for node in reversed([n for n in graph.nodes if n in found.inside]):
        graph.erase_node(node)
