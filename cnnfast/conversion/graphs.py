"""torch.fx's GraphModules: containers whose forward is generated, and generated anew when their graph has changed.

Each has a class of its own, into which `recompile` writes a forward, and a __call__ that calls the next class's. Both
have to be in the GraphModule's own class. So a class that is grafted on it is taken off while `recompile` runs. The
methods that copy GraphModules make new classes too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from .grafts import base_of


def methods(base: Any, fuse: Callable[[nn.Module], None]) -> dict[str, Any]:
    """Methods for the class that is grafted on a GraphModule's own class `base`: after a change of the graph the module
    is fused again, and so are its copies.
    """

    def recompiling(name: str) -> Callable[..., Any]:
        def recompile(self: Any) -> Any:
            if base_of(type(self)) is not base:  # another library has put a class of its own on top of ours
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

    # Some GraphModules only note that they are to be recompiled, and do it later, by _real_recompile.
    names = [name for name in ("recompile", "_real_recompile") if hasattr(base, name)]
    return {"__deepcopy__": deepcopy, "__copy__": shallow_copy, **{name: recompiling(name) for name in names}}


def share_graph_modules(modules: Iterable[nn.Module], memo: dict[int, Any]) -> None:
    """Puts a copy of each GraphModule among `modules` into `memo`, where copy.deepcopy finds it.

    copy.deepcopy by itself would make a new GraphModule from the graph, without the hooks and attributes of the old
    one, and torchvision's in another mode.
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
        twin.graph = twin._graph  # compiles the graph, and makes the twin its owner
