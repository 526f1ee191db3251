"""Looks at a run of a converted model: which of its modules are computed in fused steps, and which by calls of their
own, and what these cost.

A copy of the model runs on meta tensors, in the modes that the model is in. Hooks would show the calls, but containers
with hooks in them are not fused. So calls are intercepted at _compiled_call_impl, the attribute of a module that
PyTorch calls in the place of its forward if it is set, and fused steps report themselves (nn/fused.py).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves

from .. import dispatch, recording
from ..aside import does_not_run, is_callers, on_a_copy
from ..functional.entrance import capture
from ..nn.fused import HOOKS_OF_CALLS, observed
from .costs import CostCounter, Spender, Spent, size_of
from .fusion import copying_without_fusing, plan_of
from .leaves import is_norm, is_ours, replacement, why_left


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


def look(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[ObservedRun, Observation | Exception | None]:
    """(a run of the model and what it cost, what a call of the model on these inputs does).

    The call is made in the modes that the model is in now, and with gradients if they are recorded now. The second
    result is the error if that call raises although the model runs in eval mode; the run is then one in eval mode. It
    is None for a model without a module of ours, and while hooks of all modules are registered: these would see the
    call, and nothing is fused then. Raises RuntimeError if the model does not run at all.
    """

    def run(copied: nn.Module, given: tuple[Any, ...]) -> ObservedRun:
        fusing_again.close()
        for original, module in zip(model.modules(), copied.modules(), strict=True):
            if type(module) is not type(original):
                module.__class__ = type(original)
        return ObservedRun(copied).of(given)

    def run_in_eval_mode(copied: nn.Module, given: tuple[Any, ...]) -> ObservedRun:
        return ObservedRun(copied.eval()).of(given)

    told = not _has_any_global_hook() and any(map(is_ours, model.modules()))
    fusing_again = ExitStack()
    try:
        fusing_again.enter_context(copying_without_fusing())
        # On real tensors a layer that trains in several processes would wait for the others.
        made = on_a_copy(
            run, model, inputs, meta_only=torch.distributed.is_available() and torch.distributed.is_initialized()
        )
        return made, made.seen if told else None
    except Exception as error:  # as a batch norm in training raises for a single value a channel
        reason = error
    finally:
        fusing_again.close()
    try:
        return on_a_copy(run_in_eval_mode, model, inputs), reason if told else None
    except Exception as error:
        raise does_not_run(model, inputs, error) from error


class ObservedRun:
    """A run of a copied model, which is of no use afterwards: what it did with modules, and what each part cost.

    seen: what became of modules. spent: FLOPs and bytes (costs.py). shapes: (name, shape of the input) for each call of
    a module of ours, alone or fused.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.seen = Observation()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.running: list[str] = []  # the names of the fused containers whose forward is running
        self.served = recording.Trace()
        self.step: tuple[str, ...] = ()  # the modules of a fused step that is about to be computed
        self.costs = CostCounter()

    @property
    def spent(self) -> dict[Spender, Spent]:
        return self.costs.spent

    def of(self, inputs: tuple[Any, ...]) -> ObservedRun:
        for module in self.model.modules():
            silence(module)
            if not isinstance(module, torch.jit.ScriptModule):
                call = self.unit if is_unit(module) else self.container
                module.__dict__["_compiled_call_impl"] = functools.partial(call, module)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it is one operator whose FLOPs nobody counts
        # By PyTorch's own operators, and with meta tensors taken for a GPU's: autocast does not act on others.
        with dispatch.in_this_thread("torch"), dispatch.meta_as_gpu(), observed(self.fused), capture(self.function):
            try:
                with recording.trace() as self.served, self.costs:
                    self.model(*inputs)
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in self.model.modules():
            module.__dict__.pop("_compiled_call_impl", None)
        return self

    # Each takes the place of the calls of some modules.

    def container(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The call of a module whose forward calls others."""
        name = self.names[id(module)]
        fused, attends = plan_of(module) is not None, "attention" in type(module).__name__.lower()
        self.running += [name] * fused
        self.costs.attention += [name] * attends
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            del self.running[len(self.running) - fused :], self.costs.attention[len(self.costs.attention) - attends :]

    def unit(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The call of a convolution, norm or pool by itself, or of another module without children."""
        if self.costs.running is not None:  # within another: parametrizations of a weight, say
            return module._call_impl(*args, **kwargs)
        name, before = self.names[id(module)], self.served.heard_here
        fused_before = self.seen.fused[name]
        spent = self.costs.begin(Spender("module", name))
        result = module._call_impl(*args, **kwargs)
        spent.results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.costs.end()
        if self.seen.fused[name] > fused_before:  # a layer of a norm and an activation is a fused step by itself
            return result
        if is_ours(module) or is_norm(module):
            (self.seen.alone if self.served.heard_here > before else self.seen.elsewhere)[name] += 1
            self.shapes += [(name, tuple(t.shape)) for t in args[:1] if isinstance(t, Tensor)]
            if not any(name.startswith(f"{container}." if container else "") for container in self.running):
                self.seen.outside.add(name)
        return result

    # What cnnfast.nn and cnnfast.functional tell meanwhile.

    def fused(self, modules: tuple[nn.Module, ...], residual: bool, activation: str | None) -> None:
        """Told by nn/fused.py of each fused step, before it is computed."""
        names = tuple(self.names[id(m)] for m in modules if id(m) in self.names)
        into = " + ".join(
            [*(name.rpartition(".")[2] for name in names), *["residual"] * residual, *filter(None, [activation])]
        )
        for name in names:
            self.seen.fused[name] += 1
            self.seen.into[name] = into
        if names:
            self.step = names
            self.costs.begin(Spender("module", names[0]), fused=True)

    @contextmanager
    def function(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A call of a function of cnnfast.functional: a fused step's, or one of a module's own, or of a forward's."""
        step, self.step = self.step, ()
        spent = self.costs.running
        if spent is not None and not step and self._is_ours(spent.spender):
            yield
            return
        if step:
            self.shapes.append((step[0], tuple(args[0].shape)))
        else:
            spent = self.costs.begin(Spender("function", name))
        yield
        if step and spent is not None and name == "conv_bn_act" and kwargs.get("training"):
            spent.between = 2 * sum(map(size_of, spent.last[:1]))
        self.costs.end()

    def _is_ours(self, spender: Spender) -> bool:
        if spender.what != "module":
            return True
        module = self.model.get_submodule(spender.name)
        return is_ours(module) or is_norm(module)


def is_unit(module: nn.Module) -> bool:
    """Whether a call of the module counts as one: it has no children but the parametrizations of its tensors, or calls
    none, as PyTorch's attention, or is a convolution, norm or pool, of which some have children.
    """
    if isinstance(module, nn.MultiheadAttention) or is_ours(module) or is_norm(module):
        return True
    return replacement(module) is not None or bool(why_left(module)) or module._modules.keys() <= {"parametrizations"}


def silence(module: nn.Module) -> None:
    """The caller's hooks shall not see this run. A hook that does nothing takes their place, for a module with hooks is
    not fused.
    """
    for hooks in (getattr(module, name) for name in HOOKS_OF_CALLS):
        for key in [key for key, hook in hooks.items() if is_callers(hook)]:
            hooks[key] = _nothing


def _nothing(*call: Any, **keywords: Any) -> None:
    """A hook that does nothing."""
