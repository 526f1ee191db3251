"""Random bad arguments: ours refuses what PyTorch refuses, with the same kind of error and before anything is launched,
and nothing else.

Left out is where PyTorch's answer is an accident: it takes bytes for strings, and no array without axes for an int; the
others are told by `is_accident`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as theirs
from hypothesis import strategies as st

import cnnfast.functional as ours
from cnnfast.dispatch import why_torch
from cnnfast_kernels import launch

VALUES: list[Any] = [
    -(2**70), -1, 0, 1, 2, 3, 9, 2**63, 2**70, 0.5, 2.0, float("nan"), 1j,
    True, False, None, "same", "valid", "reflect", "",
    (), (1,), [2], (1, 2), [0, 1], (1, -1), (1, 2, 3), [1, 1, 1, 1],
    (True, 1), (1, None), (1.0, 2), ("same", "same"), ((1, 2), 1), {1: 2},
    {1, 2}, range(1, 3), torch.Size([2, 2]), np.int64(2), np.float32(2), np.array([1, 2]),
    object, Ellipsis, slice(1, 2),
]  # fmt: skip
SIZES = [(), (4,), (6,), (0,), (1, 4), (4, 1), (2, 4), (4, 5, 5), (2, 4, 5), (6, 4, 3), (6, 2, 3),
         (2, 4, 5, 5), (0, 4, 5, 5), (2, 0, 5, 5), (2, 4, 0, 5),
         (6, 4, 3, 3), (6, 2, 3, 3), (4, 6, 3, 3), (6, 4, 7, 3), (6, 4, 0, 3), (0, 4, 3, 3), (6, 0, 3, 3),
         (1, 2, 4, 5, 5)]  # fmt: skip
TENSOR_DTYPES = [torch.float32] * 6 + [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.complex64,
]


@dataclass(frozen=True)
class TensorOf:
    """Ones of a size and dtype: what a case prints instead of a tensor."""

    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def make(self) -> torch.Tensor:
        return torch.ones(self.size, dtype=self.dtype)


X, W, V, C4, C6 = (TensorOf(size) for size in ((2, 4, 5, 5), (6, 4, 3, 3), (4, 6, 3, 3), (4,), (6,)))
ONE_TRUTH = TensorOf((), torch.bool)
ROW, FILTERS = TensorOf((2, 4, 5)), TensorOf((6, 4, 3))
# What each function is called with before arguments are replaced, in the order of its parameters.
VALID: dict[str, dict[str, Any]] = {
    "conv2d": {"input": X, "weight": W, "bias": C6, "stride": 1, "padding": (1, 0), "dilation": 1, "groups": 1},
    "conv1d": {"input": ROW, "weight": FILTERS, "bias": C6, "stride": 1, "padding": 1, "dilation": 1, "groups": 1},
    "conv_transpose2d": {
        "input": X, "weight": V, "bias": C6, "stride": 2, "padding": (1, 0), "output_padding": (0, 1),
        "groups": 1, "dilation": 1,
    },
    "max_pool2d": {
        "input": X, "kernel_size": 2, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
        "return_indices": False,
    },
    "avg_pool2d": {
        "input": X, "kernel_size": (2, 3), "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": True,
        "divisor_override": None,
    },
    "adaptive_avg_pool2d": {"input": X, "output_size": (2, 3)},
    "batch_norm": {
        "input": X, "running_mean": C4, "running_var": C4, "weight": C4, "bias": None, "training": False,
        "momentum": 0.1, "eps": 1e-5,
    },
    "conv_bn_act": {
        "input": X, "weight": W, "running_mean": C6, "running_var": C6, "bn_weight": None, "bn_bias": C6,
        "training": True, "momentum": 0.1,
        "eps": 1e-5, "bias": C6, "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Misuse:
    """A call of `function` in which `bad` arguments took the place of good ones."""

    function: str
    bad: dict[str, Any]

    def arguments(self, names: set[str]) -> dict[str, Any]:
        given = {**VALID[self.function], **{name: value for name, value in self.bad.items() if name in names}}
        return {name: value.make() if isinstance(value, TensorOf) else value for name, value in given.items()}

    def counts(self) -> Counter[tuple[str, str]]:
        return Counter([("function", self.function), ("bad arguments", str(len(self.bad)))])


@st.composite
def misuses(draw: st.DrawFn) -> Misuse:
    function = draw(st.sampled_from([*VALID]))
    names = draw(st.lists(st.sampled_from([*VALID[function]]), min_size=1, max_size=2, unique=True))
    tensors = st.builds(TensorOf, st.sampled_from(SIZES), st.sampled_from(TENSOR_DTYPES))
    values = st.sampled_from(VALUES)
    return Misuse(function, {name: draw(values if draw(st.booleans()) else tensors) for name in names})


def is_accident(case: Misuse) -> bool:
    """PyTorch lets a list of numbers fail where Python asks for its truth, looks at little where it has nothing to
    compute, and calls a tensor of one truth value no int, by an error of another type than it has for others.
    """
    flags = [case.bad.get(name) for name in ("training", "eps")]
    several = any(isinstance(value, np.ndarray) or (isinstance(value, TensorOf) and value.size) for value in flags)
    x = case.bad.get("input")
    empty = (
        isinstance(x, TensorOf) and 0 in x.size and (len(x.size) == 1 or x.dtype != torch.float32 or len(case.bad) > 1)
    )
    return several or empty or any(isinstance(value, TensorOf) and value == ONE_TRUTH for value in case.bad.values())


def composed(input, weight, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, bias, **geometry):
    y = theirs.conv2d(input, weight, bias, **geometry)
    return theirs.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps).relu()


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What a call returns, or the type of what it raises."""
    try:
        return function(**arguments)
    except Exception as error:
        return type(error)


def check_misuse(case: Misuse, device: torch.device) -> None:
    right = composed if case.function == "conv_bn_act" else getattr(theirs, case.function)
    every = set(case.bad)
    expected = outcome(right, case.arguments(every))
    why_torch(torch.ones(1, dtype=torch.bfloat16))  # it tries a kernel the first time it is asked
    launches: list[launch.Launched] = []
    with launch.observe(launches.append):
        mine = outcome(getattr(ours, case.function), case.arguments(every))
    raised = [isinstance(result, type) for result in (mine, expected)]
    assert raised[0] == raised[1], (
        f"ours raises {mine}, PyTorch does not" if raised[0] else f"PyTorch raises {expected}, ours does not"
    )
    if raised[0]:
        # of several mistakes either may be named
        allowed = {expected, *(outcome(right, case.arguments({name})) for name in every)}
        assert mine in {error for error in allowed if isinstance(error, type)}, f"ours: {mine}, PyTorch's: {expected}"
        assert launches == []
    else:
        for a, b in zip(
            *((result if isinstance(result, tuple) else (result,)) for result in (mine, expected)), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
