"""Modules to test with: random state, and results and gradients of a call as agreement.run gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast.activations import LEAKY_SLOPE, activate
from tests.support.agreement import Outcome, normal, run


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random; variances and the weights of norms positive."""
    with torch.no_grad():
        for i, (name, t) in enumerate([*module.named_parameters(), *module.named_buffers()]):
            if t.is_floating_point():
                t.copy_(normal(*t.shape, seed=seed + i) * (0.3 if t.dim() > 1 else 1.0))
                if name.endswith("running_var") or (t.dim() == 1 and name.endswith("weight")):
                    t.abs_().add_(0.5)
    return module


class _Call(nn.Module):
    def __init__(self, module: nn.Module, function: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs: Any) -> Tensor:
        return self.module(*inputs) if self.function is None else self.function(self.module, *inputs)


def outcome(module: nn.Module, *inputs: Tensor | None, function: Callable[..., Tensor] | None = None) -> Outcome:
    """module(*inputs), or function(module, *inputs), with gradients of the inputs and of all parameters that
    want one.
    """
    names = [f"module.{name}" for name, _ in module.named_parameters()]
    parameters = list(module.parameters())

    def call(*tensors: Tensor) -> Tensor:
        state = dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(_Call(module, function), state, tensors[: len(inputs)])

    frozen = [len(inputs) + i for i, p in enumerate(parameters) if not p.requires_grad]
    return run(call, [*inputs, *(p.detach() for p in parameters)], frozen)


def assert_same_buffers(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-12, atol=1e-12)


def one_by_one(
    conv: nn.Module,
    bn: nn.Module,
    x: Tensor,
    residual: Tensor | float | None = None,
    activation: str | None = None,
    activation_arg: float | None = None,
) -> Tensor:
    """What nn.conv_bn_act fuses, by calling the members."""
    y = bn(conv(x))
    y = y if residual is None else y + residual
    return activate(y, activation, LEAKY_SLOPE if activation_arg is None else activation_arg)
