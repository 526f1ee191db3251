"""Subclasses made at run time: a module keeps its identity, its state and its class's name, and gets another forward.

A grafted class inherits directly from the module's own class, so that isinstance, super(), methods, repr and state_dict
are what they were. It is never pickled: a pickle names the module's own class, and reading it grafts again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..nn.scripting import RevertToScript

Regraft = Callable[[nn.Module], None]

# Between looking for a class and making it: two threads shall not make two classes for one purpose.
_making = threading.RLock()


def base_of(cls: type) -> type:
    """The class that `cls` was grafted on, or `cls` itself."""
    return cls.__dict__.get("_cnnfast_base", cls)


def own_class(module: nn.Module) -> type:
    """The class of `module` below the one that torch.nn.utils.parametrize makes for a parametrized module."""
    cls = type(module)
    return cls.__bases__[0] if _is_of_parametrizations(cls, module) else cls


def set_class(module: nn.Module, cls: type) -> None:
    """Makes `cls` the class of `module`; its parametrizations stay on top.

    When its last parametrization is removed, PyTorch gives a module the first base of its class. So the class on top is
    made anew, directly on `cls`. It is made for this module alone, since a deepcopy shares the class on top with its
    original.
    """
    top: Any = type(module)
    module.__class__ = type(top.__name__, (cls,), dict(top.__dict__)) if _is_of_parametrizations(top, module) else cls


def _is_of_parametrizations(cls: type, module: nn.Module) -> bool:
    """Whether `cls`, the class of `module`, is the one where PyTorch keeps a property for each parametrized tensor."""
    if "parametrizations" not in module._modules or not parametrize.is_parametrized(module):
        return False
    names: Any = module._modules["parametrizations"]._modules  # pyright: ignore[reportOptionalMemberAccess]
    base, *others = cls.__bases__
    # Compiled calls ask this too, and torch.compile breaks the graph at cls.__dict__: hence getattr.
    own = (isinstance(p := getattr(cls, name, None), property) and p is not getattr(base, name, None) for name in names)
    return not others and all(own)


def grafted(base: type, purpose: Any, make: Callable[[], type]) -> type:
    """The class that was grafted on `base` for an equal purpose, or the one that is now made for it."""
    with _making:
        return grafted_before(base, purpose) or make()


def grafted_before(base: type, purpose: Any) -> type | None:
    """The class that was grafted on `base` for an equal purpose, if there is still one.

    It is looked for among the subclasses, which a class knows by weak references. A cache of ours would keep every
    class alive, with all that it holds, also those that torch.fx and parametrizations make for a single instance.
    """
    return next(
        (cls for cls in type.__subclasses__(base) if base_of(cls) is base and vars(cls)["_cnnfast_purpose"] == purpose),
        None,
    )


def graft(base: type, bases: tuple[type, ...], namespace: dict[str, Any], regraft: Regraft, purpose: Any) -> type:
    """A subclass of `bases`, the first of which is `base`, with the name of `base`.

    regraft: grafts a copy of a module, or one that is read from a pickle. purpose: by which `grafted_before` finds it.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        own = type(self)
        function, arguments, *state = super(made, self).__reduce_ex__(protocol)
        function, *arguments = (base if part is own else part for part in (function, *arguments))
        return (_rebuilt, (regraft, bool(state and state[0] is not None), function, *arguments), *state)

    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    kept = {"_cnnfast_base": base, "_cnnfast_purpose": purpose}
    made: Any = type(base.__name__, bases, {"__reduce_ex__": reduce, **named, **kept, **namespace})
    if not hasattr(made, "__prepare_scriptable__"):
        made.__prepare_scriptable__ = RevertToScript.__prepare_scriptable__
    return made


def _rebuilt(regraft: Regraft, has_state: bool, function: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """The module that `function` makes, grafted: at once, or if its state is still to come, when it gets that."""
    module = function(*arguments)
    if has_state:
        object.__setattr__(module, "__class__", _pending_class(type(module), regraft))
    else:
        regraft(module)
    return module


def _pending_class(base: type, regraft: Regraft) -> Any:
    """A subclass of `base` for a module that waits for its state, and is grafted when it is set."""

    def set_state(self: Any, state: dict[str, Any]) -> None:
        object.__setattr__(self, "__class__", base)
        self.__setstate__(state)
        regraft(self)

    return type(base.__name__, (base,), {"__setstate__": set_state})
