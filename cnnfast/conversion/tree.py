"""A second tree of modules over the same parameters and buffers."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .grafts import own_class, set_class
from .graphs import share_graph_modules

# Not looked into: what copy.deepcopy shares (a function leads to all its module's variables) or never copies, and what
# refers to nothing.
OPAQUE = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType),
    *(types.FrameType, types.TracebackType, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType),
    *(str, bytes, int, float, complex, type(None)),
)

# those of state_dict and load_state_dict too
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def share(model: nn.Module, function: str) -> nn.Module:
    """What copy.deepcopy(model) would be, but over the very same tensors: Parameters and buffers, and all others that
    are found.

    In the copy's hooks, whatever of the model they hold (its modules, and what is in their attributes) is the copy's,
    as deepcopy has it. What a hook does not hold of the model is shared: nobody could get at a copy of it, and it may
    be one that cannot be copied. So a user's recorder or a profiler goes on seeing the model that takes the place of
    this one. Functions are shared, as deepcopy shares them, with the variables that they have closed over. Raises
    TypeError, in the name of `function`, if an attribute or a hook cannot be copied without other tensors.
    """
    found = list(_references([model]).values())
    memo: dict[int, Any] = {id(t): t for t, _ in found if _is(t, Tensor)}
    all_hooks = [hooks for m, _ in found if _is(m, nn.Module) for hooks in _hooks(m)]
    # filled as soon as it is known what else of the model is copied
    memo |= {id(hooks): type(hooks)() for hooks in all_hooks}
    try:
        share_graph_modules(model.modules(), memo)
        twin = copy.deepcopy(model, memo)
        memo |= _foreign([hook for hooks in all_hooks for hook in hooks.values()], memo)
        for hooks in all_hooks:
            memo[id(hooks)].update((key, copy.deepcopy(hook, memo)) for key, hook in hooks.items())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TypeError(
            f"{function}(): an attribute or a hook of this {type(model).__name__} cannot be copied ({reason}): use inplace=True"
        ) from error
    copies = _tensors(twin)
    for name, t in _tensors(model).items():
        if copies.get(name) is not t:  # scripted modules, and others with a __deepcopy__ of their own
            raise TypeError(
                f"{function}(): a part of this {type(model).__name__} copies itself with another {name}: use inplace=True"
            )
    for module in twin.modules():
        # deepcopy shares the class that its parametrizations have made for one module
        if own_class(module) is not type(module):
            set_class(module, own_class(module))
    return twin


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """isinstance, of what does not pass itself off as something else: a weak proxy asks what it stands for, which may
    be gone.
    """
    return issubclass(type(value), kind)


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    """Its dictionaries of hooks by number."""
    return [vars(module)[name] for name in HOOKS if name in vars(module)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _references(roots: Iterable[Any], known: Iterable[int] = ()) -> dict[int, tuple[Any, list[int]]]:
    """All objects that `roots` lead to, by id: each with the ids of those that it refers to. The hooks of modules are
    left out.

    Where objects whose ids are `known` are referred to, their ids are given and they are not looked into.
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
    # deepcopy keeps it, but what has one may follow it, as handles and hooks of PyTorch's do
    if _is(value, weakref.ref):
        return [value()]
    if _is(value, nn.Module):
        left_out = {id(hooks) for hooks in _hooks(value)} | {id(vars(value))}
        return [r for r in (*vars(value).values(), *gc.get_referents(value)) if id(r) not in left_out]
    return gc.get_referents(value)


def _foreign(hooks: list[Any], memo: dict[int, Any]) -> dict[int, Any]:
    """Of all that hooks lead to, what leads to nothing that `memo` has copied, by id."""
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
