"""What comes after a fused step's convolution or norm, and how much of it the step takes: a residual that would change
the result's dtype or size, and a prelu that is differentiated, are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import LEAKY_SLOPE, ActivationName, activate
from ..functional.arguments import autocast
from ..functional.fused import wants_gradient

Slope = float | Tensor | None  # leaky_relu's number, or prelu's parameter


class Rest(NamedTuple):
    """What comes after the convolution, or the norm: act(y + residual)."""

    residual: Tensor | None = None
    activation: ActivationName | None = None
    activation_arg: Slope = None

    def __call__(self, y: Tensor) -> Tensor:
        """By PyTorch's own operators."""
        y = y if self.residual is None else y + self.residual
        return activate(y, self.activation, LEAKY_SLOPE if self.activation_arg is None else self.activation_arg)


def split(
    rest: Rest, size: Sequence[int], x: Tensor, modules: tuple[torch.nn.Module, ...], rows: bool = False
) -> tuple[Rest, Rest]:
    """(what a fused step of `modules` takes of `rest`, what PyTorch does after it). size: of the step's result, whose
    dtype is x's. rows: of a 1-D convolution, whose residual has one axis less.
    """
    now, later = rest, Rest()
    residual = rest.residual
    if residual is not None:
        fits = isinstance(residual, Tensor) and residual.dtype == x.dtype and not (rows and residual.dim() != 3)
        image = residual.unsqueeze(2) if rows and fits else residual
        now, later = (rest._replace(residual=image), Rest()) if fits and image.shape == size else (Rest(), rest)
    if now.activation == "prelu" and isinstance(now.activation_arg, Tensor):  # otherwise functional's own error
        now, later = _split_prelu(now, size, x, modules)
    return now, later


def _split_prelu(rest: Rest, size: Sequence[int], x: Tensor, modules: tuple[torch.nn.Module, ...]) -> tuple[Rest, Rest]:
    """The same for prelu, where the residual fits. A fused step takes it if nothing is differentiated, which has no
    kernel, and if PyTorch would neither cast what it is applied to, as it does under autocast, nor refuse the slopes.
    """
    given: Any = rest.activation_arg
    cast, slope = autocast(x.new_empty(0), given)
    parameters = (p for module in modules for p in module.parameters())
    if (
        wants_gradient(x, slope, rest.residual, *parameters)
        or not cast.dtype == slope.dtype == x.dtype
        or tuple(slope.shape) not in ((1,), (size[1],))
    ):
        return rest._replace(activation=None, activation_arg=None), Rest(None, "prelu", given)
    return rest._replace(activation_arg=slope), Rest()
