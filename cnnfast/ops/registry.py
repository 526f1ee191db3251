"""How an operator is registered, and called, once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._C import _get_tracing_state, _has_storage, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling

from ..dispatch import PLAIN, transformed, why_transformed
from ..recording import record_torch, recorded, traces

LIBRARY = torch.library.Library("cnnfast", "DEF")


class Operator(NamedTuple):
    """An operator without the dispatcher: what launches its kernels, and what only allocates its results."""

    implementation: Callable[..., Any]
    fake: Callable[..., Any]


OPERATORS: dict[str, Operator] = {}  # by name


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    plain: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines cnnfast::<schema> and returns what calls it. `function` differentiates it; its forward calls that again.

    `plain` is the same in PyTorch's operators, for transforms that reach into a backward; what no backward calls needs
    none.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.cnnfast, name).default
    tensors = [i for i, argument in enumerate(operator._schema.arguments) if "Tensor" in str(argument.type)]
    OPERATORS[name] = Operator(implementation, fake)
    traced = recorded(name)(implementation)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _with_tuples(traced), key)
    torch.library.register_fake(f"cnnfast::{name}", fake, lib=LIBRARY)
    if function is not None:
        LIBRARY.impl(name, _with_tuples(_differentiable(operator, function, tensors)), "Autograd")
    return _entrance(operator, implementation, traced, function, tensors, plain)


def _with_tuples(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher hands over as lists is hashable, as it is where functions call."""
    return lambda *arguments: implementation(*(tuple(a) if type(a) is list else a for a in arguments))


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

    return call
