"""A Sequential of residual blocks gets a forward that links them (nn/stages.py), and a forward that calls several such
Sequentials, or blocks, one after another links these too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import fx, nn

from ..functional.blocks import Link
from ..nn.stages import may_link, through
from .grafts import base_of, graft, grafted, own_class, set_class

_PURPOSE = "a stage of residual blocks"


def link(module: nn.Module) -> None:
    """Gives a Sequential in which two residual blocks follow one another a class whose forward links them."""
    unlink(module)
    if type(module) is nn.Sequential and any(may_link(a) and may_link(b) for a, b in pairwise(module.children())):
        module.__class__ = grafted(nn.Sequential, _PURPOSE, _graft_forward)


def unlink(module: nn.Module) -> None:
    """Gives such a Sequential its own class again."""
    own = own_class(module)
    if own.__dict__.get("_cnnfast_purpose") == _PURPOSE:
        set_class(module, base_of(own))


def join_stages(graph: fx.Graph, modules: Mapping[str, nn.Module], call: Callable[..., Any]) -> None:
    """Puts one call of `call` into the graph for each row of modules that may be linked, where each is called of what
    the one before it gave, and nothing else is computed of that or between the calls.
    """
    for last in reversed(graph.nodes):
        row = [last]
        while _may_follow(row[0], modules) and _may_follow(row[0].args[0], modules) and _is_next(row[0]):
            row.insert(0, row[0].args[0])
        if len(row) > 1:
            with graph.inserting_before(last):
                stages = tuple(graph.get_attr(str(node.target)) for node in row)
                joined = graph.call_function(call, (stages, row[0].args[0]))
            joined.meta["named"] = "self." + str(last.target)
            last.replace_all_uses_with(joined)
            for node in reversed(row):
                graph.erase_node(node)


def _may_follow(node: Any, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node calls a module of one argument that may be linked."""
    called = isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return called and may_link(modules[str(node.target)])


def _is_next(node: fx.Node) -> bool:
    """Whether a node is the only one that reads its argument, and nothing is computed between the two."""
    given: Any = node.args[0]
    between = node.prev
    while between is not given and between.op == "get_attr":
        between = between.prev
    return between is given and len(given.users) == 1


def _graft_forward() -> type:
    def forward(self: nn.Sequential, input: Any) -> Any:
        return through(self, input)[0]

    def linked(self: nn.Sequential, x: Any, below: Link | None) -> tuple[Any, Link | None]:
        return through(self, x, below)

    return graft(nn.Sequential, (nn.Sequential,), {"forward": forward, "linked": linked}, link, _PURPOSE)
