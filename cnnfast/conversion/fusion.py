"""Fused containers: the class that a container gets, and when its generated forward may stand for its own."""

from __future__ import annotations

import functools
import linecache
from typing import Any

from torch import Tensor, nn

from ..nn.fused import served, unwatched
from .effects import traits
from .grafts import base_of, graft
from .planning import Group, Plan, Variant, examine, plan
from .refused import Refused


def fuse(block: nn.Module) -> None:
    """Gives a container a fused forward, if there is one, on top of its own class; on none that was there before."""
    unfuse(block)
    try:
        found = plan(block)
    except Refused:
        return
    if found is not None:
        block.__class__ = _fused_class(type(block), found)


def unfuse(block: nn.Module) -> None:
    if plan_of(block) is not None:
        block.__class__ = base_of(type(block))
        block.__dict__.pop("_cnnfast_changed", None)


def plan_of(block: nn.Module) -> Plan | None:
    """What a container was fused by, whether or not it has changed since."""
    return getattr(type(block), "_cnnfast_plan", None)


def groups_in_force(block: nn.Module) -> list[Group]:
    """The groups of a fused container that has not changed since; none otherwise."""
    found = plan_of(block)
    groups = {} if found is None else {g.conv: g for v in reversed(found.variants) if _members(block, found, v) for g in v.groups}
    return list(groups.values())


def why_not_fused(block: nn.Module) -> list[str]:
    """What of a container is not fused, and why: a sentence for the whole, or one for each convolution, as they follow "not fused:"."""
    try:
        left = (plan_of(block) or examine(block)).left
    except Refused as reason:
        return [str(reason)]
    return list(left) if plan_of(block) or left else ["its forward calls no convolution"]


@functools.cache
def _fused_class(base: Any, found: Plan) -> type:
    variants = [(variant, _compile(base, variant)) for variant in found.variants]

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs:
            for variant, fused in variants:
                if variant.takes(args):
                    if _serves(self, found, variant, args):
                        return fused(self, *args)
                    break
        return base.forward(self, *args, **kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        base.__setattr__(self, name, value)
        if name not in ("training", "__class__"):
            changed(self)

    def delete_attribute(self: Any, name: str) -> None:
        base.__delattr__(self, name)
        changed(self)

    def changed(self: Any) -> None:
        """Another attribute may mean another forward: it is traced anew."""
        if type(self) is cls:
            fuse(self)
        else:  # another library has put its own class on top of ours
            self.__dict__["_cnnfast_changed"] = True

    methods = {"forward": forward, "__setattr__": set_attribute, "__delattr__": delete_attribute, "_cnnfast_plan": found}
    cls = graft(base, (base,), methods, fuse)
    return cls


def _compile(base: type, variant: Variant) -> Any:
    """The function that the source says. Its lines show in tracebacks."""
    file = f"<cnnfast fusion of {base.__module__}.{base.__qualname__} {abs(hash(variant)):x}>"
    linecache.cache[file] = (len(variant.source), None, variant.source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = dict(variant.names)
    exec(compile(variant.source, file, "exec"), namespace)
    return namespace["forward"]


def _serves(block: nn.Module, found: Plan, variant: Variant, args: tuple[Any, ...]) -> bool:
    """Whether kernels serve these arguments, and the container and its members are as they were, and unwatched."""
    if not served(args[0] if isinstance(args[0], Tensor) else args[0][0]):
        return False
    members = _members(block, found, variant)
    return bool(members) and unwatched(*members)


def _members(block: nn.Module, found: Plan, variant: Variant) -> list[nn.Module]:
    """The members of all groups, and all of what these were moved over; none if the container has changed since it was fused."""
    if tuple(block._modules) != found.children or "_cnnfast_changed" in block.__dict__:
        return []
    members = []
    for path, cls in variant.members:
        module = _at(block, path)
        if type(module) is not cls:
            return []
        members.append(module)
    for path, were in variant.crossed:
        module = _at(block, path)
        if module is None or traits(module) != were:
            return []
        members += module.modules()
    return members


def _at(block: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    module: Any = block
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module
