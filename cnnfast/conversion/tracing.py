"""What a container's forward does, one level deep: children are called, never entered.

The trace must be the same program as the forward, or there is none. `Refused` says what stands against it: whatever the
forward decides or computes while it is traced (randomness, tensors of its own, types of its arguments, side effects)
would be frozen into the trace.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import itertools
import operator
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .grafts import own_class
from .refused import Refused
from .watching import watched

# Functions that may stand in a rewritten forward: their results depend on their arguments alone.
FUNCTIONS: set[Any] = {
    getattr(namespace, name)
    for namespace, names in (
        (operator, "add sub mul truediv floordiv mod neg pow matmul getitem iadd isub imul itruediv"),
        (torch, "add sub mul div cat concat stack flatten unflatten reshape permute transpose squeeze unsqueeze chunk split"
                " relu sigmoid tanh softmax mean sum amax maximum minimum clamp matmul einsum pixel_shuffle"),
        (F, "relu relu6 leaky_relu silu gelu hardswish hardsigmoid sigmoid elu softmax pad interpolate pixel_shuffle linear"
            " normalize max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"),
    )
    for name in names.split()
} | {getattr}  # fmt: skip
_METHOD_NAMES = (
    "add sub mul div add_ sub_ mul_ div_ relu relu_ sigmoid sigmoid_ tanh softmax mean sum amax view reshape flatten unflatten size dim"
    " permute transpose squeeze unsqueeze chunk split expand expand_as contiguous repeat clamp to float type_as"
)
METHODS = set(_METHOD_NAMES.split())


# Optional arguments that are tried as tensors too; each costs two traces.
MOST_OPTIONAL = 2


class _Proxy(fx.Proxy):
    """Stands for a tensor or a list, and does not let itself be asked what it is, unless it is an argument: then its
    kind is known.
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


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
    "ilshift",
    "irshift",
):
    setattr(_Proxy, f"__{_name}__", _record_in_place(getattr(operator, _name)))  # fx would take them for x = x + y


class _Tracer(fx.Tracer):
    def __init__(self, arguments: tuple[str, ...], lists: frozenset[str]) -> None:
        super().__init__(autowrap_modules=())  # pyright: ignore[reportArgumentType]
        self.arguments, self.lists = arguments, lists
        self.asked: set[str] = set()
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.gradients = torch.is_grad_enabled()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

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
    """kinds: of each argument, "tensor" or "list" if the forward asked, "any" if not. asked: names of those it asked
    about.
    """

    graph: fx.Graph
    kinds: tuple[str, ...]
    asked: frozenset[str]


class _NoTensors(TorchDispatchMode):
    """No operation on a real tensor happens while a forward is traced."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Refused(f"its forward computes on tensors of its own ({func})")


def signatures(cls: type) -> list[tuple[str, ...]]:
    """Names of the positional arguments of `cls.forward` that a call may give: those required; then with optional ones
    too.

    Optional ones count if they default to None. Raises Refused if it takes *args, **kwargs or a required keyword, or
    needs no argument.
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
    """The graph of the forward of `block`'s class, the same in training and in eval mode, with gradients and without.
    Raises Refused.

    `arguments` are tensors, those in `lists` lists of tensors. `block` is afterwards as it was, whatever its forward
    does to it.
    """
    # a parametrized tensor is its own too
    if block._parameters or block._buffers or own_class(block) is not type(block):
        raise Refused("it owns parameters or buffers")
    traced = _trace_once(block, arguments, lists, training=True)
    if str(traced.graph) != str(_trace_once(block, arguments, lists, training=False).graph):
        raise Refused("its forward depends on training mode, or on whether gradients are recorded")
    for node in traced.graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if node.op == "get_attr":
            raise Refused(f"its forward reads {name} itself")
        if node.op == "call_function" and node.target not in FUNCTIONS:
            raise Refused(f"its forward calls {name}, which is not among the functions known to be safe")
        if node.op == "call_method" and node.target not in METHODS:
            raise Refused(f"its forward calls the method {name}, which is not among those known to be safe")
    return traced


def _alive(references: Sequence[weakref.ref[Any]]) -> bool:
    """Whether any refers to an object that is reachable: torch.fx leaves some in cycles (a frame that refers to
    itself).
    """
    for generation in (0, 2):  # most are young; to search all objects takes its time
        if all(reference() is None for reference in references):
            return False
        gc.collect(generation)
    return any(reference() is not None for reference in references)


def _trace_once(block: nn.Module, arguments: tuple[str, ...], lists: frozenset[str], training: bool) -> Traced:
    with _unchanged(block), _in_mode(block, training), torch.set_grad_enabled(training), _NoTensors():
        tracer = _Tracer(arguments, lists)
        try:
            with _lists_recorded(tracer), watched(block):
                graph = tracer.trace(block)
        except Refused:
            raise
        except Exception as error:  # control flow on values, len() of a tensor, ...: fx says which
            line = str(error).strip().splitlines()
            raise Refused(f"its forward cannot be traced ({type(error).__name__}: {line[0] if line else ''})") from None
    if _alive(tracer.proxies):
        raise Refused("its forward keeps a tensor somewhere")
    # an annotation may name what its module has imported, and the generated one has not
    graph.output_node().type = None
    kinds = tuple(("list" if name in lists else "tensor") if name in tracer.asked else "any" for name in arguments)
    return Traced(graph, kinds, frozenset(tracer.asked))


@contextlib.contextmanager
def _lists_recorded(tracer: _Tracer) -> Iterator[None]:
    """torch.cat and its kin ask for the type of their list before they let anyone record them: of an argument they are
    recorded first.
    """
    originals = {name: getattr(torch, name) for name in ("cat", "concat", "stack")}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(tensors, fx.Proxy):
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


@contextlib.contextmanager
def _in_mode(block: nn.Module, training: bool) -> Iterator[None]:
    """Sets the flag of every module below, past whatever their `train` and `__setattr__` do."""
    # scripted modules have theirs elsewhere
    before = [(m, m.training) for m in block.modules() if "training" in m.__dict__]
    for m, _ in before:
        m.__dict__["training"] = training
    try:
        yield
    finally:
        for m, flag in before:
            m.__dict__["training"] = flag


@contextlib.contextmanager
def _unchanged(block: nn.Module) -> Iterator[None]:
    """Puts back attributes, lists, dicts and sets of all modules, and random numbers; raises Refused if any of them
    changed.
    """
    modules = list(block.modules())
    before = [(vars(m), _contents(vars(m))) for m in modules]
    inner = [[(v, _contents(v)) for v in vars(m).values() if isinstance(v, list | dict | set)] for m in modules]
    draws = random.getstate(), numpy.random.get_state()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        changed = [_restore(*entry) for entry in (*before, *(e for entries in inner for e in entries))]
        drawn = random.getstate() != draws[0] or not all(map(numpy.array_equal, numpy.random.get_state(), draws[1]))
        random.setstate(draws[0])
        numpy.random.set_state(draws[1])
    if drawn:
        raise Refused("its forward draws random numbers")
    if any(changed):
        raise Refused("its forward changes attributes")
    if printed.getvalue():
        raise Refused("its forward prints")


def _contents(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _restore(value: Any, contents: Any) -> bool:
    """Whether a list, dict or set holds other objects than it did; it does not any more."""
    now, then = _contents(value), contents
    if isinstance(value, dict):
        same = list(now) == list(then) and all(now[k] is then[k] for k in then)
    else:
        same = len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))
    if same:
        return False
    value.clear()
    value.extend(then) if isinstance(value, list) else value.update(then)
    return True
