"""What a function takes: numbers and sizes checked as PyTorch checks them, autocast, unbatched input."""

from __future__ import annotations

from numbers import Real
from operator import index
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..spelling import unknown_value

Algorithm = Literal["auto", "direct", "im2col", "torch"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
# What other libraries call them, as spelling.py folds words.
OTHER_ALGORITHMS: dict[str, Algorithm] = {
    **dict.fromkeys(("default", "none"), "auto"),
    **dict.fromkeys(("implicit", "implicitgemm"), "direct"),
    **dict.fromkeys(("explicit", "explicitgemm", "gemm", "unfold"), "im2col"),
    **dict.fromkeys(("cudnn", "library"), "torch"),
}

Size = int | tuple[int, ...] | list[int]


class Sides(NamedTuple):
    """Zeros on each side of an image. cnnfast.nn gives it to conv2d, conv_act and conv_bn_act in the place of a padding
    where an axis has another number of them at its end than at its start, which PyTorch's own convolutions do not take.
    """

    top: int
    bottom: int
    left: int
    right: int


def _index(value: Any) -> Any:
    """`value` as an int: anything with __index__ but a bool. Raises TypeError, and ValueError beyond 64 bits, as
    PyTorch does.
    """
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool):
        raise TypeError
    if type(value) is not int:  # what torch.compile keeps symbolic says that it is one, and index would fix its value
        value = index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value


def _refuse(function: str, name: str, value: Any, kind: str, error: Exception) -> Exception:
    """What to raise for a value that `_index` refused."""
    if isinstance(error, ValueError):
        return ValueError(f"{function}(): {name} must fit into 64 bits, but got {name}={value!r}")
    return TypeError(f"{function}(): {name} must be {kind}, but got {name}={value!r}")


def as_int(function: str, name: str, value: Any) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    try:
        return _index(value)
    except (TypeError, ValueError) as error:
        raise _refuse(function, name, value, "an int", error) from None


def as_float(function: str, name: str, value: Any) -> Any:
    """A number, or a tensor of no dimension, as PyTorch takes a float."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0):
        return float(value)
    raise TypeError(f"{function}(): {name} must be a float, but got {name}={value!r}")


def axis_sizes(function: str, name: str, value: Any, least: int, n: int = 2) -> tuple[int, ...]:
    """`value`, an int or a tuple or list of them, as n ints, one an axis (n is 1 or 2), each at least `least`."""
    if type(value) is int:
        values = (value,) * n
    elif type(value) is tuple and len(value) == n and type(value[0]) is int and type(value[-1]) is int:
        values = value
    else:
        values = expand_sizes(function, name, value, n)
    if not least <= values[0] < 2**31 or not least <= values[-1] < 2**31:
        values = expand_sizes(function, name, value, n)  # what does not even fit into 64 bits is refused as that
        rule = "less than 2**31" if min(values) >= least else "non-negative" if least == 0 else "positive"
        raise RuntimeError(f"{function}(): {name} must be {rule}, but got {name}={values}")
    return values


def expand_sizes(function: str, name: str, value: Any, n: int) -> tuple[int, ...]:
    """`value`, an int or a tuple or list of them, as n ints."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, tuple | list) else (value,)
    try:
        values = tuple(map(_index, values))
    except (TypeError, ValueError) as error:
        kind = "an int or a pair of ints" if n == 2 else "an int or a tuple of one int"
        raise _refuse(function, name, value, kind, error) from None
    if len(values) not in (1, n):
        raise RuntimeError(
            f"{function}(): {name} must be a single integer value or a list of {n} values, "
            f"but got {name}={list(values)}"
        )
    return values if len(values) == n else values * n


def check_flag(function: str, name: str, value: Any) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{function}(): {name} must be a bool, but got {name}={value!r}")


def check_algorithm(function: str, algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise unknown_value(function, "algorithm", algorithm, ALGORITHMS, OTHER_ALGORITHMS)


def batched(input: Tensor, n: int = 2) -> tuple[Tensor, bool]:
    """PyTorch's unbatched [C, H, W] (n = 2 axes) as a batch of one."""
    return (input.unsqueeze(0), True) if input.dim() == n + 1 else (input, False)


def autocasts(x: Tensor) -> bool:
    """Whether torch.autocast is in force where x lies."""
    return (x.is_cuda or x.is_cpu) and torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Casts as PyTorch's convolutions do under torch.autocast: floating tensors but float64, to the dtype in force,
    where kernels are.
    """
    device = "cuda" if x.is_cuda else "cpu"
    if not torch.is_autocast_enabled(device) or not (x.is_cuda or x.is_cpu):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )
