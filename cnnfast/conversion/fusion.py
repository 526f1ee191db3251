"""Fused containers: the class that a container gets, and when its generated forward may stand for its own."""

from __future__ import annotations

import functools
import inspect
import linecache
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, fx, nn

from ..functional.blocks import Link
from ..nn.fused import forward_replaced, served, why_watched
from . import graphs
from .calling import call_block, call_linked_block
from .effects import buffers, traits
from .grafts import base_of, graft, grafted, own_class, set_class
from .planning import FusionPlan, Group, Variant, examine, plan
from .refused import Refused
from .showing import shown

_copying: ContextVar[bool] = ContextVar("copies are not fused: their classes are set afterwards", default=False)


@contextmanager
def copying_without_fusing() -> Iterator[None]:
    """Copies of fused containers are not traced and fused anew, which takes long: they keep the classes that their
    originals had before they were fused. Who copies gives them the fused classes.
    """
    token = _copying.set(True)
    try:
        yield
    finally:
        _copying.reset(token)


def fuse(block: nn.Module) -> None:
    """Gives a container a class with a fused forward, if there is one; it takes the place of an earlier such class."""
    if _copying.get():
        return
    unfuse(block)
    try:
        found = plan(block)
    except Refused:
        return
    if found is not None:
        block.__class__ = _fused_class(type(block), found)


def unfuse(block: nn.Module) -> None:
    """Gives a fused container its own class again."""
    if plan_of(block) is not None:
        set_class(block, base_of(own_class(block)))
        block.__dict__.pop("_cnnfast_changed", None)


def plan_of(block: nn.Module) -> FusionPlan | None:
    """What a container was fused by, also if it has changed since; None if it is not fused."""
    return getattr(type(block), "_cnnfast_plan", None)


def groups_of(block: nn.Module) -> list[tuple[Group, str]]:
    """The groups that a container was fused with, each with the reason why it is not computed in one step now, or with
    the empty string if it is.
    """
    found = plan_of(block)
    if found is None:
        return []
    replaced = (
        f"the forward of {base_of(type(block)).__name__} was replaced on the instance"
        if forward_replaced(block)
        else ""
    )
    groups: dict[str, tuple[Group, str]] = {}
    for variant in found.variants:
        reason = _why_idle(block, found, variant) or replaced
        for group in variant.groups:
            if group.first not in groups or groups[group.first][1]:
                groups[group.first] = group, reason
    return list(groups.values())


def why_not_fused(block: nn.Module) -> list[str]:
    """Why a container is not fused, or each of its convolutions and norms that is not, in sentences that follow "not
    fused:".
    """
    try:
        left = (plan_of(block) or examine(block)).left
    except Refused as reason:
        return [str(reason)]
    return list(left) if plan_of(block) or left else ["its forward calls nothing that could be"]


def _fused_class(base: Any, found: FusionPlan) -> type:
    purpose = found, base.forward
    return grafted(base, purpose, lambda: _graft_forward(base, found, purpose))


def _graft_forward(base: Any, found: FusionPlan, purpose: Any) -> type:
    variants = [(variant, _compile(base, variant)) for variant in found.variants]
    whole = [(variant, _compile(base, variant, linked=True)) for variant in found.variants if variant.whole]
    in_positions = _by_positions(base.forward)
    serves = _serves  # `forward` will have the global variables of base.forward: it sees only what it closes over

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = in_positions(args, kwargs) if kwargs or (args and args[-1] is None) else args
        for variant, fused in variants:
            if variant.takes(given):
                if serves(self, found, variant, given):
                    return fused(self, *given)
                break
        return base.forward(self, *args, **kwargs)

    def linked(self: Any, x: Any, below: Link | None) -> tuple[Tensor, Link | None] | None:
        """See nn/stages.py."""
        for variant, fused in whole:
            if variant.takes((x,)) and serves(self, found, variant, (x,)):
                return fused(self, (x, below))
        return None

    def set_attribute(self: Any, name: str, value: Any) -> None:
        base.__setattr__(self, name, value)
        if name not in unread:
            changed(self)

    def delete_attribute(self: Any, name: str) -> None:
        base.__delattr__(self, name)
        changed(self)

    def changed(self: Any) -> None:
        """The forward may depend on what has changed: it is traced anew. A replica of DataParallel's is not: it gets
        parameters, buffers and children of the same structure, one by one, for each call of the model.
        """
        if "_is_replica" in self.__dict__:
            return
        if type(self) is cls:
            fuse(self)
        elif isinstance(self, cls):  # another library has put a class of its own on top of ours
            self.__dict__["_cnnfast_changed"] = True

    def replicate(self: Any) -> Any:
        with copying_without_fusing():  # it sets attributes before `_is_replica`
            return base._replicate_for_data_parallel(self)

    unread = ["training", "__class__"]
    methods = {"__setattr__": set_attribute, "__delattr__": delete_attribute, "_cnnfast_plan": found}
    methods["_replicate_for_data_parallel"] = replicate
    methods["forward"] = _in_place_of(base.forward, forward)
    if whole:
        methods["linked"] = linked
    if base.__repr__ is nn.Module.__repr__:  # whoever has a text of its own keeps it
        methods["__repr__"] = lambda self: shown(self, groups_of)
    if issubclass(base, fx.GraphModule):
        methods |= graphs.methods(base, fuse)
        unread += ["graph", "_graph"]  # setting `graph` sets `_graph`, and then recompiles
    cls = graft(base, (base,), methods, fuse, purpose)
    return cls


def _in_place_of(original: Any, forward: types.FunctionType) -> Any:
    """`forward` with the name and the global variables of `original`: torch.fx looks into the latter for functions that
    it shall not trace into.
    """
    names = getattr(original, "__globals__", forward.__globals__)
    moved = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    return functools.wraps(original)(moved)


def _by_positions(forward: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...]]:
    """A function that turns the arguments of a call of `forward` into positional ones. It leaves out a None at the end
    where that is the default, and returns () if the arguments do not fit, or if one of them is keyword-only.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p.name if p.kind is p.POSITIONAL_OR_KEYWORD else "" for p in positional]
    without = [p.default is None for p in positional]

    def in_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        given = list(args)
        for name in keywords[len(args) :]:
            if name not in kwargs:
                break
            given.append(kwargs[name])
        if len(given) != len(args) + len(kwargs) or len(given) > len(keywords):
            return ()
        while given and given[-1] is None and without[len(given) - 1]:
            given.pop()
        return tuple(given)

    return in_positions


def _compile(base: type, variant: Variant, linked: bool = False) -> Any:
    """The function that the source of a variant defines. Tracebacks show its lines. linked: it calls the residual block
    that it is with what call_linked_block takes, and returns what that does.
    """
    file = f"<cnnfast fusion of {base.__module__}.{base.__qualname__} {abs(hash(variant)):x}>"
    linecache.cache[file] = (len(variant.source), None, variant.source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = dict(variant.names)
    if linked:
        namespace = {name: call_linked_block if of is call_block else of for name, of in variant.names}
    exec(compile(variant.source, file, "exec"), namespace)
    return namespace["forward"]


def _serves(block: nn.Module, found: FusionPlan, variant: Variant, args: tuple[Any, ...]) -> bool:
    """Whether a variant may compute this call: kernels serve the arguments, and the container and its members are as
    they were, without hooks.
    """
    return served(args[0] if isinstance(args[0], Tensor) else args[0][0]) and not _why_idle(block, found, variant)


def _why_idle(block: nn.Module, found: FusionPlan, variant: Variant) -> str:
    """Why a variant may not stand for the container's own forward now, whatever the arguments; the empty string if it
    may. Every call asks this, and so does a report.

    The first question is for a forward that a library has kept on the instance: its class may be another by now, and
    nothing told it.
    """
    members = _members(block, found, variant) if plan_of(block) is found else []
    if not members:
        return f"{base_of(type(block)).__name__} has changed since it was fused: convert again"
    return why_watched(*members, members=variant.members)


def _members(block: nn.Module, found: FusionPlan, variant: Variant) -> list[nn.Module]:
    """The members of all groups, and all modules that these were moved past; none if the container has changed since it
    was fused.
    """
    if tuple(block._modules) != found.children or "_cnnfast_changed" in block.__dict__:
        return []
    members = []
    for path, cls in variant.members:
        module = _at(block, path)
        if module is None or own_class(module) is not cls:
            return []
        members.append(module)
    for path, were in variant.crossed:
        module = _at(block, path)
        if module is None or traits(module) != were:
            return []
        members += module.modules()
    return members if variant.buffers in (None, buffers(members)) else []


def _at(block: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    module: Any = block
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module
