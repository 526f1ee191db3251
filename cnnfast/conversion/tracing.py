"""What a container's forward does, one level deep: its children are called, and not looked into.

A trace is made only if it is the same program as the forward. Whatever the forward decides or computes by itself while
it is traced would be frozen into the trace: random numbers, tensors of its own, the types of its arguments, side
effects. A forward that does any of that is not traced, and `Refused` says why.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .grafts import own_class
from .refused import Drew, Refused
from .restoring import in_mode, unchanged
from .watching import watched

# Functions and methods that may stand in a rewritten forward: their results depend on their arguments alone.
FUNCTIONS: set[Any] = {
    getattr(namespace, name)
    for namespace, names in (
        (operator, "add sub mul truediv floordiv mod neg pow matmul getitem iadd isub imul itruediv"),
        (
            torch,
            "add sub mul div cat concat stack flatten unflatten reshape permute transpose squeeze unsqueeze chunk split"
            " relu sigmoid tanh softmax mean sum amax maximum minimum clamp matmul einsum pixel_shuffle",
        ),
        (
            F,
            "relu relu6 leaky_relu silu gelu hardswish hardsigmoid mish sigmoid elu softmax pad interpolate"
            " pixel_shuffle linear normalize max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d",
        ),
    )
    for name in names.split()
} | {getattr}
_METHODS = (
    "add sub mul div add_ sub_ mul_ div_ relu relu_ sigmoid sigmoid_ tanh softmax mean sum amax view reshape flatten"
    " unflatten size dim permute transpose squeeze unsqueeze chunk split expand expand_as contiguous repeat clamp to"
    " float type_as"
)
METHODS = set(_METHODS.split())

# torch.fx puts functions of its own into torch.nn.Module and elsewhere while it traces, and so does this file into
# torch: for the whole process. Two threads that trace at once would leave each other's there for good. Meanwhile other
# threads may call modules and functions: what was put there sends them on.
_tracing = threading.RLock()

# How often a forward is traced if random numbers are drawn meanwhile and other threads may have drawn them. A forward
# that draws does so each time.
TRIES = 4

# The optional arguments of a forward that are tried as tensors too: for each the forward is traced twice more.
MOST_OPTIONAL = 2


class _Proxy(fx.Proxy):
    """Stands for a tensor or a list. isinstance() of an argument is answered by the kind that it is traced as. Of a
    result nothing is known, and a forward that asks for its type is refused.
    """

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return _Proxy
        tracer: Any = self.tracer
        return tracer.kind_of(self.node)


def _record_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


# torch.fx by itself would record `x += y` as `x = x + y`.
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul ilshift irshift"
for _name in _IN_PLACE.split():
    setattr(_Proxy, f"__{_name}__", _record_in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def __init__(self, arguments: tuple[str, ...], lists: frozenset[str]) -> None:
        super().__init__(autowrap_modules=())  # pyright: ignore[reportArgumentType]
        self.arguments, self.lists = arguments, lists
        self.asked: set[str] = set()
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.gradients = torch.is_grad_enabled()
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Every module's call while it traces, those by other threads too."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Every parameter, buffer and child that is read of a module while it traces, by other threads too."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if torch.is_grad_enabled() != self.gradients:
            raise Refused("its forward switches gradients on or off")
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def kind_of(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            raise Refused("its forward asks for the type of a result")
        self.asked.add(str(node.target))
        return list if node.target in self.lists else Tensor

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, fx.Proxy) and isinstance(a, Tensor):
            raise Refused("its forward uses a tensor that is neither an argument nor a result of a child")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Arguments that are not given keep their defaults."""
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.arguments)]


@dataclass(frozen=True)
class Traced:
    """kinds: what each argument was traced as, "tensor" or "list" if the forward asked for its type, "any" if it did
    not. asked: the names of the arguments whose type it asked for.
    """

    graph: fx.Graph
    kinds: tuple[str, ...]
    asked: frozenset[str]


class _NoTensors(TorchDispatchMode):
    """Refuses a forward that computes on real tensors while it is traced."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Refused(f"its forward computes on tensors of its own ({func})")


def signatures(cls: type) -> list[tuple[str, ...]]:
    """The names of the arguments of `cls.forward` that a call may give by position: first the required ones alone, then
    one optional argument more each time, at most MOST_OPTIONAL.

    An optional argument counts if its default is None. Raises Refused if the forward takes *args, **kwargs or a
    required keyword, or needs no argument.
    """
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # pyright: ignore[reportAttributeAccessIssue]
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or (p.kind == p.KEYWORD_ONLY and p.default is p.empty):
            raise Refused(f"its forward takes {p}")
    positional = [p for p in parameters if p.kind != p.KEYWORD_ONLY]
    names = tuple(p.name for p in positional)
    required = sum(p.default is p.empty for p in positional)
    if not required:
        raise Refused("its forward needs no argument")
    optional = itertools.takewhile(lambda p: p.default is None, positional[required : required + MOST_OPTIONAL])
    return [names[: required + i] for i in range(len(list(optional)) + 1)]


def trace(block: nn.Module, arguments: tuple[str, ...], lists: frozenset[str] = frozenset()) -> Traced:
    """The graph of the forward of `block`'s class, which is the same in training and in eval mode, with gradients and
    without. Raises Refused where there is none.

    `arguments` are tensors, except that those in `lists` are lists of tensors. `block` is afterwards as it was,
    whatever its forward does to it.
    """
    # A parametrized tensor is in neither dictionary: PyTorch keeps it as a property, in a class of this module alone.
    if block._parameters or block._buffers or own_class(block) is not type(block):
        raise Refused("it owns parameters or buffers")
    traced = _trace_once(block, arguments, lists, training=True)
    if str(traced.graph) != str(_trace_once(block, arguments, lists, training=False).graph):
        raise Refused("its forward depends on training mode, or on whether gradients are recorded")
    for node in traced.graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if node.op == "call_module" and _has_own_call(block.get_submodule(str(name))):
            raise Refused(f"its member {name} has a __call__ of its own")
        if node.op == "get_attr":
            raise Refused(f"its forward reads {name} itself")
        if node.op == "call_function" and node.target not in FUNCTIONS:
            raise Refused(f"its forward calls {name}, which is not among the functions known to be safe")
        if node.op == "call_method" and node.target not in METHODS:
            raise Refused(f"its forward calls the method {name}, which is not among those known to be safe")
    return traced


def _has_own_call(module: nn.Module) -> bool:
    """Whether a module's class does more in a call than PyTorch's do. That would be recorded beside the call, and done
    twice.
    """
    definer = next(cls for cls in type(module).__mro__ if "__call__" in vars(cls))
    return not definer.__module__.startswith("torch.")


def _alive(references: Sequence[weakref.ref[Any]]) -> bool:
    """Whether any of the objects is still reachable. torch.fx leaves some in cycles, of a frame that refers to itself,
    which the collector has to find first.
    """
    for generation in (0, 2):  # most of them are young, and to search all objects takes long
        if all(reference() is None for reference in references):
            return False
        gc.collect(generation)
    return any(reference() is not None for reference in references)


def _trace_once(block: nn.Module, arguments: tuple[str, ...], lists: frozenset[str], training: bool) -> Traced:
    tracer, graph = _recorded_without_others(block, arguments, lists, training)
    if _alive(tracer.proxies):
        raise Refused("its forward keeps a tensor somewhere")
    # The annotation of a result may name what the forward's own module has imported; the generated source has not.
    graph.output_node().type = None
    kinds = tuple(("list" if name in lists else "tensor") if name in tracer.asked else "any" for name in arguments)
    return Traced(graph, kinds, frozenset(tracer.asked))


def _recorded_without_others(
    block: nn.Module, arguments: tuple[str, ...], lists: frozenset[str], training: bool
) -> tuple[_Tracer, fx.Graph]:
    """As _recorded, again if random numbers were drawn that may have been another thread's."""
    for _ in range(TRIES - 1 if threading.active_count() > 1 else 0):
        with contextlib.suppress(Drew):
            return _recorded(block, arguments, lists, training)
    return _recorded(block, arguments, lists, training)


def _recorded(
    block: nn.Module, arguments: tuple[str, ...], lists: frozenset[str], training: bool
) -> tuple[_Tracer, fx.Graph]:
    with _tracing, unchanged(block), in_mode(block, training), torch.set_grad_enabled(training), _NoTensors():
        tracer = _Tracer(arguments, lists)
        try:
            with _lists_recorded(tracer), watched(block):
                return tracer, tracer.trace(block)
        except Refused:
            raise
        except Exception as error:  # control flow on values, or len() of a tensor, say: the message of torch.fx tells
            line = str(error).strip().splitlines()
            raise Refused(f"its forward cannot be traced ({type(error).__name__}: {line[0] if line else ''})") from None


@contextlib.contextmanager
def _lists_recorded(tracer: _Tracer) -> Iterator[None]:
    """torch.cat, concat and stack look into their first argument before torch.fx can record the call. Meanwhile they
    are replaced by functions that record the call at once where that argument is a proxy.
    """
    originals = {name: getattr(torch, name) for name in ("cat", "concat", "stack")}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(tensors, fx.Proxy) and tensors.tracer is tracer:
                return tracer.create_proxy("call_function", original, (tensors, *args), kwargs)
            return original(tensors, *args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(torch, name, recording(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
