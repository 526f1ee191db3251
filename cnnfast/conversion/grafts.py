"""Subclasses made at run time: a module keeps its identity, its state and its class's name, and gets another forward.

A grafted class stands directly on the module's own class, so that isinstance, super(), methods, repr and state_dict are what
they were. It is never pickled: what is pickled is the module's own class, and reading it back grafts again.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Regraft = Callable[[nn.Module], None]


def base_of(cls: type) -> type:
    """The class that `cls` was grafted on, or `cls` itself."""
    return cls.__dict__.get("_cnnfast_base", cls)


def graft(base: type, bases: tuple[type, ...], namespace: dict[str, Any], regraft: Regraft) -> type:
    """A subclass of `bases`, the first of which is `base`, under the name of `base`. `regraft` does it again, for a copy or a pickle."""

    def reduce(self: Any, protocol: Any) -> Any:
        function, arguments, *state = super(grafted, self).__reduce_ex__(protocol)
        if function is copyreg.__newobj__ and arguments[0] is type(self):  # pyright: ignore[reportAttributeAccessIssue]
            return (_pending, (base, regraft, *arguments[1:]), *state)
        return (function, tuple(base if a is type(self) else a for a in arguments), *state)

    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "_cnnfast_base": base}
    grafted: Any = type(base.__name__, bases, {"__reduce_ex__": reduce, **named, **namespace})
    return grafted


def _pending(base: type, regraft: Regraft, *arguments: Any) -> nn.Module:
    """A module without state yet; when it gets its state it becomes a `base`, and grafted."""
    return _pending_class(base, regraft).__new__(_pending_class(base, regraft), *arguments)


@functools.cache
def _pending_class(base: type, regraft: Regraft) -> Any:
    def set_state(self: Any, state: dict[str, Any]) -> None:
        self.__class__ = base
        self.__setstate__(state)
        regraft(self)

    return type(base.__name__, (base,), {"__setstate__": set_state})
