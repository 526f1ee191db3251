"""torch.fx's GraphModules: containers whose forward is generated, and generated anew when their graph has changed.

Each has a class of its own, into which `recompile` writes the forward and a __call__ that calls the next class's. Both
belong into the GraphModule's own class, not into one that is grafted on it, which is therefore taken off meanwhile. The
methods by which GraphModules are copied make new classes, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from .grafts import base_of


def methods(base: Any, fuse: Callable[[nn.Module], None]) -> dict[str, Any]:
    """Of the class that is grafted on a GraphModule's own: what runs after a change of the graph, and copies, are fused
    again.
    """

    def recompiling(name: str) -> Callable[..., Any]:
        def recompile(self: Any) -> Any:
            if base_of(type(self)) is not base:  # another library has put its own class on top of ours
                return getattr(base, name)(self)
            self.__class__ = base
            code = getattr(self, name)()
            fuse(self)
            return code

        return recompile

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        twin = base.__deepcopy__(self, memo)
        fuse(twin)
        return twin

    def shallow_copy(self: Any) -> Any:
        twin = base.__copy__(self)
        fuse(twin)
        return twin

    # the latter: where recompile only plans to
    names = [name for name in ("recompile", "_real_recompile") if hasattr(base, name)]
    return {"__deepcopy__": deepcopy, "__copy__": shallow_copy, **{name: recompiling(name) for name in names}}


def share_graph_modules(modules: Iterable[nn.Module], memo: dict[int, Any]) -> None:
    """Puts a copy of each GraphModule among `modules` into `memo`, from which deepcopy takes them.

    copy.deepcopy alone makes a GraphModule from its graph and forgets its hooks and attributes, and the mode that
    torchvision's was in.
    """
    twins = []
    for module in modules:
        if isinstance(module, fx.GraphModule):
            twin = memo[id(module)] = type(module).__new__(type(module))
            type(twin).__name__ = type(module).__name__
            twins.append((module, twin))
    for module, twin in twins:
        vars(twin).update(copy.deepcopy(vars(module), memo))
    for _, twin in twins:
        twin.graph = twin._graph  # compiles it, and makes it the twin's own
