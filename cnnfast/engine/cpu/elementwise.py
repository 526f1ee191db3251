"""Steps that PyTorch's own operators compute: into memory that is given, where they can, or into their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import OPERATORS
from ..plan import Step
from ..planning.propagation import references
from .activations import in_place
from .routines import Lookup, Routine, Values, by_parameter

_aten = torch.ops.aten

# Operators that write what they compute straight into `out`. torch's functions reach the operator faster than
# torch.ops does. Many more have an overload with `out`, but those compute into memory of their own first.
_WRITERS: dict[str, Callable[..., Tensor]] = {
    "aten.add.Tensor": torch.add,
    "aten.sub.Tensor": torch.sub,
    "aten.mul.Tensor": torch.mul,
    "aten.div.Tensor": torch.div,
    "aten.maximum.default": torch.maximum,
    "aten.minimum.default": torch.minimum,
    "aten.clamp.default": torch.clamp,
    "aten.clamp.Tensor": torch.clamp,
    "aten.relu.default": lambda x, *, out: torch.clamp_min(x, 0, out=out),
    "aten.sigmoid.default": torch.sigmoid,
    "aten.tanh.default": torch.tanh,
    "aten.hardtanh.default": _aten.hardtanh.out,
    "aten.silu.default": _aten.silu.out,
    "aten.hardswish.default": _aten.hardswish.out,
    "aten.hardsigmoid.default": _aten.hardsigmoid.out,
    "aten.gelu.default": _aten.gelu.out,
    "aten.mish.default": _aten.mish.out,
    "aten.leaky_relu.default": _aten.leaky_relu.out,
    "aten.elu.default": _aten.elu.out,
    "aten.avg_pool2d.default": _aten.avg_pool2d.out,
    "aten.mean.dim": torch.mean,
}


def affine(step: Step, lookup: Lookup) -> Routine:
    given = by_parameter(step)
    x, scale, shift = (lookup.number(given[name]) for name in ("x", "scale", "shift"))
    residual = lookup.optional_number(given["residual"])
    activate = in_place(given["activation"], given["numbers"])

    def compute(values: Values, out: Tensor) -> Tensor:
        if residual is None:
            torch.addcmul(values[shift], values[x], values[scale], out=out)
        else:  # `out` may be the residual, which has to be read before anything is written
            torch.addcmul(values[residual], values[x], values[scale], out=out)
            out.add_(values[shift])
        if activate is not None:
            activate(out)
        return out

    return Routine("PyTorch (addcmul)", compute, takes_out=True)


def sum_of(step: Step, lookup: Lookup) -> Routine:
    given = by_parameter(step)
    x, y = lookup.number(given["x"]), lookup.number(given["y"])
    activate = in_place(given["activation"], given["numbers"])

    def compute(values: Values, out: Tensor) -> Tensor:
        torch.add(values[x], values[y], out=out)
        if activate is not None:
            activate(out)
        return out

    return Routine("PyTorch (add)", compute, takes_out=True)


def mean_of_images(step: Step, lookup: Lookup) -> Routine:
    """A pool that leaves one pixel: PyTorch's operator finds that out anew in each call, and allocates."""
    x = lookup.fill(step.args[0])
    return Routine("PyTorch (mean)", lambda values, out: torch.mean(x(values), (-2, -1), True, out=out), takes_out=True)


def by_pytorch(step: Step, lookup: Lookup) -> Routine:
    """Any operator, by the function of its name."""
    name = f"PyTorch ({step.operator.removeprefix('aten.').partition('.')[0]})"
    parts = [lookup.fill(argument) for argument in step.args]
    named = {key: lookup.fill(argument) for key, argument in step.kwargs.items()}
    writer = _WRITERS.get(step.operator)
    if writer is not None:

        def write(values: Values, out: Tensor) -> Tensor:
            return writer(*[f(values) for f in parts], **{k: f(values) for k, f in named.items()}, out=out)

        return Routine(name, write, takes_out=True)
    function: Any = OPERATORS[step.operator]

    def compute(values: Values, out: None) -> Any:
        return function(*[f(values) for f in parts], **{k: f(values) for k, f in named.items()})

    if step.is_view:
        return Routine(name, compute)
    given = [lookup.numbers[argument] for argument in references(step)]

    def compute_anew(values: Values, out: None) -> Any:
        y = compute(values, out)
        return [_own(part, values, given) for part in y] if several else _own(y, values, given)

    several = len(step.outputs) > 1
    return Routine(name, compute_anew)


def _own(y: Tensor, values: Values, given: Sequence[int]) -> Tensor:
    """A result in memory of its own, which later steps may write over. PyTorch gives views of constants, and of values
    that the plan expects in another order of memory, where a plan counts on new tensors.
    """
    address = y.untyped_storage().data_ptr()
    return y.clone() if any(values[n].untyped_storage().data_ptr() == address for n in given) else y
