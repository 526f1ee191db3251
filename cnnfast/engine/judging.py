"""The self-check of freezing: what a frozen network computes on the example, beside the original in float64.

The measure is the signal-to-quantisation-noise ratio of each floating-point result, in decibels:
10 log10(sum(right**2) / sum((right - computed)**2)). float32 must reach 100 dB, which is a relative error of 1e-5 in
the root mean square, and half precision 40 dB, which is 1e-2. A network may amplify roundings so much that PyTorch's
own result, in the same dtype, is worse than that, as networks with random weights do. Then the limit is 6 dB, a factor
of two in the error, below what PyTorch itself reaches.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ..aside import leaving_no_trace, real_copy
from ..dispatch import in_this_thread
from .accepting import places
from .structures import LEAF, Structure

LIMITS = {torch.float32: 100.0, torch.bfloat16: 40.0, torch.float16: 40.0}  # dB
BELOW_OWN = 6.0  # dB that a result may be worse than PyTorch's own in the same dtype
WIDTH = 100


class NotClose(ValueError):
    """The results of a frozen network are too far from the original's."""


@dataclass(frozen=True)
class Reference:
    """What the original computes on the example. why: in what else than float64, and for what reason."""

    results: tuple[Tensor, ...]
    why: str = ""


@dataclass(frozen=True)
class ResultCheck:
    """One result. sqnr, own: the decibels of the frozen network and, where that was asked, of the original in the same
    dtype; infinite if nothing differs, None for integers and booleans. equal: the share of the elements of those that
    are equal; in half precision it is told, and not judged. agreement: the share of rows whose largest element stands
    in the same column, for a result [N, classes]. problem: why the result is refused, or the empty string.
    """

    name: str
    sqnr: float | None = None
    limit: float | None = None
    own: float | None = None
    equal: float | None = None
    agreement: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class SelfCheck:
    """What freezing found of all results. against: what was computed by the original, "float64" or why it was not."""

    results: tuple[ResultCheck, ...]
    against: str = "float64"

    @property
    def ok(self) -> bool:
        return not any(result.problem for result in self.results)

    @property
    def sqnr(self) -> float | None:
        """Of the worst result, in dB; None where no result is floating-point."""
        return min((r.sqnr for r in self.results if r.sqnr is not None), default=None)

    @property
    def agreement(self) -> float | None:
        """Of the worst result [N, classes]; None without one."""
        return min((r.agreement for r in self.results if r.agreement is not None), default=None)

    def __str__(self) -> str:
        table = Table(title=f"the results on the example, against the original in {self.against}", title_justify="left")
        for heading in ("result", "SQNR", "limit", "PyTorch's own", "equal", "top-1", ""):
            table.add_column(heading, overflow="fold", justify="left" if heading in ("result", "") else "right")
        for r in self.results:
            shares = ("" if share is None else f"{share:.1%}" for share in (r.equal, r.agreement))
            table.add_row(Text(r.name), *map(decibels, (r.sqnr, r.limit, r.own)), *shares, Text(r.problem or "ok"))
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(table)
        return text.getvalue().rstrip()


def decibels(value: float | None) -> str:
    return "" if value is None else "exact" if value == math.inf else f"{value:.1f} dB"


def computed(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The results of a copy of the model in another dtype on the inputs, cast to it. Leaves no trace."""
    model = real_copy(model).eval().to(dtype)  # a copy of torchvision's feature extractors is in training mode
    leaves, structure = Structure.flatten(inputs)
    cast = structure.build([t.detach().to(dtype) if t.is_floating_point() else t for t in leaves])
    with leaving_no_trace(), in_this_thread("torch"), torch.no_grad():
        return tuple(Structure.flatten(model(*cast))[0])


def reference(model: nn.Module, inputs: tuple[Any, ...]) -> Reference:
    """What the model computes on the inputs, in float64 if it can."""
    try:
        return Reference(computed(model, inputs, torch.float64))
    except Exception as error:  # whatever a foreign forward raises: it may ask for float32 by name
        first = str(error).strip().partition("\n")[0]
        why = f"float32, since in float64 it raises {type(error).__name__}: {first}"
    return Reference(computed(model, inputs, torch.float32), why)


def judge(
    results: Sequence[Tensor],
    right: Reference,
    structure: Structure,
    dtype: torch.dtype,
    own: Callable[[], tuple[Tensor, ...]],
) -> SelfCheck:
    """results: of the frozen network on the example. structure: what they are put into. own: computes the original's
    results in `dtype`; called only where a result is below the limit of its dtype.
    """
    names = paths(structure)
    limit = LIMITS[dtype]
    checks = [_judged(*each, limit) for each in zip(names, results, right.results, strict=True)]
    if any(check.problem for check in checks):
        theirs = own()
        checks = [
            _judged(*each, limit, mine) if check.problem else check
            for check, mine, *each in zip(checks, theirs, names, results, right.results, strict=True)
        ]
    return SelfCheck(tuple(checks), right.why or "float64")


def paths(structure: Structure, path: str = "") -> list[str]:
    """How each tensor of a result is written: "result", "result[0]", "result['out']"."""
    path = path or "result"
    if structure.kind == LEAF:
        return [path]
    return [
        name
        for part, where in zip(structure.parts, places(structure, path), strict=True)
        for name in paths(part, where)
    ]


def _judged(name: str, result: Tensor, right: Tensor, limit: float, own: Tensor | None = None) -> ResultCheck:
    if result.shape != right.shape:
        return ResultCheck(name, problem=f"its shape is {list(result.shape)}, not {list(right.shape)}")
    if not right.is_floating_point():
        equal = share_equal(result, right)
        needed = 1.0 if own is None else share_equal(own, right)
        judged = limit == LIMITS[torch.float32]
        return ResultCheck(name, equal=equal, problem="its elements differ" if judged and equal < needed else "")
    sqnr, mine = sqnr_of(result, right), None if own is None else sqnr_of(own, right)
    if mine is not None:
        limit = min(limit, mine - BELOW_OWN)
    agreement = None
    if right.dim() == 2 and right.shape[0] > 0 and right.shape[1] > 1:
        agreement = (result.argmax(1) == right.argmax(1)).double().mean().item()
    problem = "" if sqnr >= limit else "below its limit"
    return ResultCheck(name, sqnr, limit, mine, agreement=agreement, problem=problem)


def share_equal(result: Tensor, right: Tensor) -> float:
    return (result == right).double().mean().item() if right.numel() else 1.0


def sqnr_of(result: Tensor, right: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB. Elements that are NaN in both, or the same infinity, are equal; where
    only one is not finite, or the signal is zero and the noise is not, the ratio is minus infinity.
    """
    result, right = result.double(), right.double()
    same = (result == right) | (result.isnan() & right.isnan())
    noise = (result - right).masked_fill(same, 0.0)
    signal = right.masked_fill(~right.isfinite(), 0.0)
    # Scaled by the largest element, so that no square overflows or vanishes.
    scale = max(signal.abs().max().item(), noise.abs().nan_to_num(math.inf).max().item()) if right.numel() else 0.0
    if scale == 0.0 or bool(same.all()):
        return math.inf
    if scale == math.inf:
        return -math.inf
    signal_power, noise_power = ((t / scale).square().sum().item() for t in (signal, noise))
    if signal_power == 0.0 or noise_power == 0.0:
        return math.inf if noise_power == 0.0 else -math.inf
    return 10 * math.log10(signal_power / noise_power)
