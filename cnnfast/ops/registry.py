"""How an operator is registered, and called, once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling

from ..dispatch import PLAIN, _traces, recorded

LIBRARY = torch.library.Library("cnnfast", "DEF")


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], function: type[torch.autograd.Function] | None = None
) -> Callable[..., Any]:
    """Defines cnnfast::<schema> and returns what calls it. `function` differentiates it; its forward calls that again."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.cnnfast, name).default
    tensors = [i for i, argument in enumerate(operator._schema.arguments) if "Tensor" in str(argument.type)]
    traced = recorded(name)(implementation)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, traced, key)
    torch.library.register_fake(f"cnnfast::{name}", fake, lib=LIBRARY)
    if function is not None:
        LIBRARY.impl(name, _differentiable(operator, function, tensors), "Autograd")
    return _entrance(operator, implementation, traced, function, tensors)


def _differentiable(operator: Any, function: type[torch.autograd.Function], tensors: list[int]) -> Callable[..., Any]:
    """`function` where a gradient may be asked for, the bare operator where not: that saves the host time of a graph node."""

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(arguments[i] is not None and arguments[i].requires_grad for i in tensors):
            return function.apply(*arguments)
        with below_autograd():
            return operator(*arguments)

    return call


def _intercepted() -> bool:
    """Somebody stands between a call of an operator and its kernels: a tracer, a mode, a transform, the profiler."""
    return bool(
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state()
        or _profiler_enabled()
    )


def _entrance(
    operator: Any,
    implementation: Callable[..., Any],
    traced: Callable[..., Any],
    function: type[torch.autograd.Function] | None,
    tensors: list[int],
) -> Callable[..., Any]:
    """What the dispatcher would do to a call, done here where that is plain: it takes 3 us a pass, and a gradient takes two."""

    def call(*arguments: Any) -> Any:
        if _intercepted() or arguments[0].is_meta:
            return operator(*arguments)
        differentiable, wanted = function is not None and torch.is_grad_enabled(), False
        for i in tensors:
            t = arguments[i]
            if t is not None:
                if type(t) not in PLAIN or t.is_neg():  # a subclass, or a negation still to be done
                    return operator(*arguments)
                wanted = wanted or (differentiable and t.requires_grad)
        if wanted:
            return function.apply(*arguments)  # pyright: ignore[reportOptionalMemberAccess]
        return (traced if _traces else implementation)(*arguments)

    return call
