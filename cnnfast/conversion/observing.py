"""Looks at a run of a converted model: which of its modules are computed in fused steps, and which by calls of their
own.

A copy of the model runs on meta tensors, in the modes that the model is in. Hooks would show the calls, but containers
with hooks in them are not fused. So calls are intercepted at _compiled_call_impl, the attribute of a module that
PyTorch calls in the place of its forward if it is set, and fused steps report themselves (nn/fused.py).
"""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .. import dispatch, recording
from ..aside import is_callers, on_a_copy
from ..nn.fused import HOOKS_OF_CALLS, observed
from ..summary import Layer, layers, summary_of
from .fusion import copying_without_fusing, plan_of
from .leaves import is_norm, is_ours


@dataclass
class Observation:
    """What a run did with modules, by their names.

    fused: how often each took part in a fused step. into: what that step computed. alone: how often a module was called
    by itself, and its class of ours served the call. elsewhere: how often it was called by itself, and that class did
    not serve. outside: the modules that were called by themselves while no fused container around them was running.
    """

    fused: Counter[str] = field(default_factory=Counter)
    into: dict[str, str] = field(default_factory=dict)
    alone: Counter[str] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)
    outside: set[str] = field(default_factory=set)

    def calls(self, name: str) -> int:
        return self.fused[name] + self.alone[name] + self.elsewhere[name]


def look(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Layer], Observation | Exception | None]:
    """(the model's layers, what a call of the model on these inputs does).

    The call is made in the modes that the model is in now, and with gradients if they are recorded now. The second
    result is the error if that call raises although the model runs in eval mode. It is None for a model without a
    module of ours, and while hooks of all modules are registered: these would see the call, and nothing is fused then.
    Raises RuntimeError if the model does not run at all.
    """

    def both(copied: nn.Module, given: tuple[Any, ...]) -> tuple[list[Layer], Observation]:
        fusing_again.close()
        for original, module in zip(model.modules(), copied.modules(), strict=True):
            if type(module) is not type(original):
                module.__class__ = type(original)
        seen = _observed(copied, given)
        return summary_of(copied, given).layers, seen

    if _has_any_global_hook() or not any(map(is_ours, model.modules())):
        return layers(model, *inputs), None
    fusing_again = ExitStack()
    try:
        fusing_again.enter_context(copying_without_fusing())
        # On real tensors a layer that trains in several processes would wait for the others.
        return on_a_copy(
            both, model, inputs, meta_only=torch.distributed.is_available() and torch.distributed.is_initialized()
        )
    except Exception as error:  # as a batch norm in training raises for a single value a channel
        reason = error
    finally:
        fusing_again.close()
    return layers(model, *inputs), reason


def _observed(model: nn.Module, inputs: tuple[Any, ...]) -> Observation:
    run = _Observer(model)
    # By PyTorch's own operators, and with meta tensors taken for a GPU's: autocast does not act on others.
    with dispatch.backend("torch"), dispatch.meta_as_gpu(), observed(run.step), recording.trace() as run.served:
        model(*inputs)
    for module in model.modules():
        module.__dict__.pop("_compiled_call_impl", None)
    return run.seen


class _Observer:
    """Takes the place of the calls of a model's modules, and notes them."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.seen = Observation()
        self.served = recording.Trace()
        self.running: list[str] = []  # the names of the fused containers whose forward is running
        for module in model.modules():
            _silence(module)
            if plan_of(module) is not None:
                module.__dict__["_compiled_call_impl"] = functools.partial(self.container, module)
            elif is_ours(module) or is_norm(module):
                module.__dict__["_compiled_call_impl"] = functools.partial(self.member, module)

    def container(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The call of a fused container."""
        self.running.append(self.names[id(module)])
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            self.running.pop()

    def member(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The call of a convolution, norm or pool by itself."""
        name, before, fused = self.names[id(module)], len(self.served), self.seen.fused[self.names[id(module)]]
        result = module._call_impl(*args, **kwargs)
        if self.seen.fused[name] > fused:  # a layer of a norm and an activation is a fused step by itself
            return result
        (self.seen.alone if len(self.served) > before else self.seen.elsewhere)[name] += 1
        if not any(name.startswith(f"{container}." if container else "") for container in self.running):
            self.seen.outside.add(name)
        return result

    def step(self, modules: tuple[nn.Module, ...], residual: bool, activation: str | None) -> None:
        """Told by nn/fused.py of each fused step."""
        names = [self.names[id(m)] for m in modules if id(m) in self.names]
        into = " + ".join(
            [*(name.rpartition(".")[2] for name in names), *["residual"] * residual, *filter(None, [activation])]
        )
        for name in names:
            self.seen.fused[name] += 1
            self.seen.into[name] = into


def _silence(module: nn.Module) -> None:
    """The caller's hooks shall not see this run. A hook that does nothing takes their place, for a module with hooks is
    not fused.
    """
    for hooks in (getattr(module, name) for name in HOOKS_OF_CALLS):
        for key in [key for key, hook in hooks.items() if is_callers(hook)]:
            hooks[key] = _nothing


def _nothing(*call: Any, **keywords: Any) -> None:
    """A hook that does nothing."""
