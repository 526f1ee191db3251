"""A second tree of modules over the same parameters and buffers."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .graphs import share_graph_modules

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def share(model: nn.Module, function: str) -> nn.Module:
    """A copy of every module of `model`, with the very same Parameter and buffer objects.

    Other tensors and hooks are shared too; a hook that is a method of one of the modules becomes that of its copy.
    Raises TypeError, in the name of `function`, if some attribute cannot be copied.
    """
    modules = list(model.modules())
    inside = {id(m) for m in modules}
    memo: dict[int, Any] = {}
    for module in modules:
        values = [*module.__dict__.values(), *module._parameters.values(), *module._buffers.values()]
        memo |= {id(t): t for t in values if isinstance(t, Tensor)}
        for hook in (hook for hooks in HOOKS for hook in getattr(module, hooks).values()):
            if id(getattr(hook, "__self__", None)) not in inside:
                memo[id(hook)] = hook
    try:
        share_graph_modules(modules, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TypeError(
            f"{function}(): an attribute of this {type(model).__name__} cannot be copied ({reason}): use inplace=True"
        ) from error
