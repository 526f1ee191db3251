"""Makes a second tree of modules over the same parameters and buffers."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from ..aside import shared_groups
from .grafts import own_class, set_class
from .graphs import share_graph_modules

M = TypeVar("M", bound=nn.Module)

# Objects that are not looked into: copy.deepcopy shares them (and a function leads to all variables of its module), or
# never copies them, or they refer to nothing.
OPAQUE = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType),
    *(types.FrameType, types.TracebackType, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType),
    *(str, bytes, int, float, complex, type(None)),
)

# The names of all dictionaries of hooks, of those for state_dict and load_state_dict too.
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def share(model: M, function: str) -> M:
    """What copy.deepcopy(model) would be, but over the very same tensors: Parameters, buffers, and all others that are
    found.

    Where a hook holds a part of the model (a module, or what is in its attributes), the copy's hook holds the copy of
    that part, as with deepcopy. Whatever else a hook holds is shared, because nobody could get at a copy of it, and it
    may be something that cannot be copied. So a user's recorder or a profiler goes on seeing the model that takes the
    place of this one. Functions are shared, as with deepcopy, and so are the variables that they have closed over.
    Raises TypeError, in the name of `function`, if an attribute or a hook cannot be copied over the same tensors.
    """
    found = list(_references([model]).values())
    memo: dict[int, Any] = {id(t): t for t, _ in found if _is(t, Tensor)} | shared_groups(model)
    all_hooks = [hooks for m, _ in found if _is(m, nn.Module) for hooks in _hooks(m)]
    # The dictionaries are filled below, once it is known what else of the model is copied.
    memo |= {id(hooks): type(hooks)() for hooks in all_hooks}
    try:
        share_graph_modules(model.modules(), memo)
        twin = copy.deepcopy(model, memo)
        memo |= _foreign([hook for hooks in all_hooks for hook in hooks.values()], memo)
        for hooks in all_hooks:
            memo[id(hooks)].update((key, copy.deepcopy(hook, memo)) for key, hook in hooks.items())
    except Exception as error:
        what = f"an attribute or a hook of this {type(model).__name__}"
        reason = f"{type(error).__name__}: {error}"
        raise TypeError(f"{function}(): {what} cannot be copied ({reason}): use inplace=True") from error
    copies = _tensors(twin)
    for name, t in _tensors(model).items():
        if copies.get(name) is not t:  # scripted modules, and others with a __deepcopy__ of their own
            what = f"a part of this {type(model).__name__}"
            raise TypeError(f"{function}(): {what} copies itself with another {name}: use inplace=True")
    for module in twin.modules():
        # The class that PyTorch makes for a parametrized module belongs to one module; deepcopy has shared it.
        if own_class(module) is not type(module):
            set_class(module, own_class(module))
    return twin


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """isinstance() by the true type: an object may claim another, and a weak proxy would ask the object that it stands
    for, which may be gone.
    """
    return issubclass(type(value), kind)


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries of a module's hooks."""
    return [vars(module)[name] for name in HOOKS if name in vars(module)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _references(roots: Iterable[Any], known: Iterable[int] = ()) -> dict[int, tuple[Any, list[int]]]:
    """All objects that `roots` lead to, by id: each with the ids of those that it refers to. The hooks of modules are
    left out. known: the ids of objects that are not looked into; where one is referred to, only its id is given.
    """
    known = set(known)
    found: dict[int, tuple[Any, list[int]]] = {}
    rest = list(roots)
    while rest:
        value = rest.pop()
        if id(value) in found or id(value) in known:
            continue
        referents = [r for r in _referents(value) if not _is(r, OPAQUE)]
        found[id(value)] = value, [id(r) for r in referents]
        rest += referents
    return found


def _referents(value: Any) -> list[Any]:
    if _is(value, (*OPAQUE, Tensor)):
        return []
    # copy.deepcopy shares a weak reference, but an object that has one may follow it, as PyTorch's handles of hooks do.
    if _is(value, weakref.ref):
        return [value()]
    if _is(value, nn.Module):
        left_out = {id(hooks) for hooks in _hooks(value)} | {id(vars(value))}
        return [r for r in (*vars(value).values(), *gc.get_referents(value)) if id(r) not in left_out]
    return gc.get_referents(value)


def _foreign(hooks: list[Any], memo: dict[int, Any]) -> dict[int, Any]:
    """All objects that hooks lead to and from which nothing can be reached that `memo` has copied, by id."""
    copied = {key for key, twin in memo.items() if id(twin) != key}
    found = _references(hooks, copied)
    users: dict[int, list[int]] = {}
    for key, (_, referents) in found.items():
        for referent in referents:
            users.setdefault(referent, []).append(key)
    leading: set[int] = set()
    rest = list(copied)
    while rest:
        for user in users.get(rest.pop(), []):
            if user not in leading:
                leading.add(user)
                rest.append(user)
    return {key: value for key, (value, _) in found.items() if key not in leading}
