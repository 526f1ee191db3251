"""Subclasses made at run time: a module keeps its identity, its state and its class's name, and gets another forward.

A grafted class stands directly on the module's own class, so that isinstance, super(), methods, repr and state_dict are what
they were. It is never pickled: what is pickled is the module's own class, and reading it back grafts again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Regraft = Callable[[nn.Module], None]


def base_of(cls: type) -> type:
    """The class that `cls` was grafted on, or `cls` itself."""
    return cls.__dict__.get("_cnnfast_base", cls)


def grafted_before(base: type, purpose: Any) -> type | None:
    """The class that was grafted on `base` for an equal purpose, if there is still one.

    A class knows its subclasses by weak references. A cache of ours would keep alive, with all that it holds, every class that is
    made for a single instance, as torch.fx and torch.nn.utils.parametrize make them.
    """
    return next((cls for cls in type.__subclasses__(base) if base_of(cls) is base and vars(cls)["_cnnfast_purpose"] == purpose), None)


def graft(base: type, bases: tuple[type, ...], namespace: dict[str, Any], regraft: Regraft, purpose: Any) -> type:
    """A subclass of `bases`, the first of which is `base`, under the name of `base`. `regraft` does it again, for a copy or a pickle.

    purpose: by which `grafted_before` finds it.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        own = type(self)
        function, arguments, *state = super(grafted, self).__reduce_ex__(protocol)
        function, *arguments = (base if part is own else part for part in (function, *arguments))
        return (_rebuilt, (regraft, bool(state and state[0] is not None), function, *arguments), *state)

    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    kept = {"_cnnfast_base": base, "_cnnfast_purpose": purpose}
    grafted: Any = type(base.__name__, bases, {"__reduce_ex__": reduce, **named, **kept, **namespace})
    return grafted


def _rebuilt(regraft: Regraft, has_state: bool, function: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """What `function` makes, grafted; if its state is still to come, then as soon as it gets that."""
    module = function(*arguments)
    if has_state:
        object.__setattr__(module, "__class__", _pending_class(type(module), regraft))
    else:
        regraft(module)
    return module


def _pending_class(base: type, regraft: Regraft) -> Any:
    def set_state(self: Any, state: dict[str, Any]) -> None:
        object.__setattr__(self, "__class__", base)
        self.__setstate__(state)
        regraft(self)

    return type(base.__name__, (base,), {"__setstate__": set_state})
