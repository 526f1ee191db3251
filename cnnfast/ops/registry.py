"""How an operator is registered, and called, once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._C import _get_tracing_state, _has_storage, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling

from ..dispatch import PLAIN, transformed, why_transformed
from ..recording import record_torch, recorded, traces

LIBRARY = torch.library.Library("cnnfast", "DEF")

# How a composed operator calls its parts, each given what calls that part, as `register` returned it: as anybody does,
# or without asking once more who stands between a call and its kernels, since its own entrance has just done so. Then
# traces are told of the parts, if there are any.
Calling = Callable[[Any], Callable[..., Any]]
AS_ANYBODY: Calling = attrgetter("entrance")
_BARE: Calling = attrgetter("implementation")
_TRACED: Calling = attrgetter("traced")


class Operator(NamedTuple):
    """An operator without the dispatcher: what launches its kernels, and what only allocates its results.

    composed: it launches none itself but calls other operators, which are what traces and recorders tell of.
    """

    implementation: Callable[..., Any]
    fake: Callable[..., Any]
    composed: bool = False


OPERATORS: dict[str, Operator] = {}  # by name


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    plain: Callable[..., Any] | None = None,
    composed: bool = False,
) -> Callable[..., Any]:
    """Defines cnnfast::<schema> and returns what calls it. `function` differentiates it; its forward calls that again.

    `plain` is the same in PyTorch's operators, for transforms that reach into a backward; what no backward calls needs
    none. `composed`: the implementation calls other operators, by the Calling that is its first argument, and launches
    nothing itself. It may return None in the place of a tensor; who calls through the dispatcher gets an empty one.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.cnnfast, name).default
    tensors = [i for i, argument in enumerate(operator._schema.arguments) if "Tensor" in str(argument.type)]
    if composed:
        OPERATORS[name] = Operator(_filled(_without_graph(partial(implementation, AS_ANYBODY))), fake, True)
        dispatched = OPERATORS[name].implementation
        implementation, traced = partial(implementation, _BARE), partial(implementation, _TRACED)
    else:
        OPERATORS[name] = Operator(implementation, fake)
        dispatched = traced = recorded(name)(implementation)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _with_tuples(dispatched), key)
    torch.library.register_fake(f"cnnfast::{name}", fake, lib=LIBRARY)
    if function is not None:
        derived = _differentiable(operator, function, tensors)
        LIBRARY.impl(name, _with_tuples(_filled(derived) if composed else derived), "Autograd")
    return _entrance(operator, implementation, traced, function, tensors, plain)


def _with_tuples(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher hands over as lists is hashable, as it is where functions call."""
    return lambda *arguments: implementation(*(tuple(a) if type(a) is list else a for a in arguments))


def _filled(call: Callable[..., Any]) -> Callable[..., Any]:
    """The results of a composed operator as the dispatcher wants them: all are tensors."""
    return lambda *arguments: tuple(arguments[0].new_empty(0) if t is None else t for t in call(*arguments))


def _without_graph(call: Callable[..., Any]) -> Callable[..., Any]:
    """A composed operator below autograd: its parts make no graph of their own."""

    def below(*arguments: Any) -> Any:
        with torch.no_grad(), below_autograd():
            return call(*arguments)

    return below


def _differentiable(operator: Any, function: type[torch.autograd.Function], tensors: list[int]) -> Callable[..., Any]:
    """`function` where a gradient may be asked for, the bare operator where not: that saves the host time of a graph
    node.
    """

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(arguments[i] is not None and arguments[i].requires_grad for i in tensors):
            return function.apply(*arguments)
        with below_autograd():
            return operator(*arguments)

    return call


def _intercepted() -> bool:
    """Somebody stands between a call of an operator and its kernels: a transform, a tracer, a mode, the profiler."""
    return bool(
        transformed()
        or is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state()
        or _profiler_enabled()
    )


def _entrance(
    operator: Any,
    implementation: Callable[..., Any],
    traced: Callable[..., Any],
    function: type[torch.autograd.Function] | None,
    tensors: list[int],
    plain: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """What the dispatcher would do to a call, done here where that is plain: it takes 3 us a pass, and a gradient takes
    two.
    """
    # Function.apply itself first looks for what functorch left of tensors, argument by argument: the loop below has
    # done so.
    differentiate: Any = function and super(torch.autograd.Function, function).apply  # pyright: ignore

    def call(*arguments: Any) -> Any:
        if _intercepted() or arguments[0].is_meta:
            if plain is not None and transformed():
                record_torch(operator._opname, why_transformed(), *arguments)
                return plain(*arguments)
            return operator(*arguments)
        differentiable, wanted = function is not None and torch.is_grad_enabled(), False
        for i in tensors:
            t = arguments[i]
            if t is not None:
                # or a batch of gradients (is_grads_batched)
                if type(t) not in PLAIN or t.is_neg() or not _has_storage(t):
                    return operator(*arguments)
                wanted = wanted or (differentiable and t.requires_grad)
        if wanted:
            return differentiate(*arguments)
        return (traced if traces else implementation)(*arguments)

    call.__dict__.update(entrance=call, implementation=implementation, traced=traced)
    return call
