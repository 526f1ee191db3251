"""How an operator is registered, once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd as below_autograd

from ..dispatch import recorded

LIBRARY = torch.library.Library("cnnfast", "DEF")


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], function: type[torch.autograd.Function] | None = None
) -> Any:
    """Defines cnnfast::<schema> and returns it. `function` differentiates it; its forward calls the operator below autograd."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.cnnfast, name).default
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, recorded(name)(implementation), key)
    torch.library.register_fake(f"cnnfast::{name}", fake, lib=LIBRARY)
    if function is not None:
        LIBRARY.impl(name, differentiable(operator, function), "Autograd")
    return operator


def differentiable(operator: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function` where a gradient may be asked for, the bare operator where not: that saves the host time of a graph node."""

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            return function.apply(*arguments)
        with below_autograd():
            return operator(*arguments)

    return call
