"""Judges one captured call: PyTorch's function, ours, and the reference in float64, on the same values.

The rule, for every tensor that a call returns or updates, and for every gradient:

    error of ours <= 2 x error of PyTorch's own function in the same dtype + floor

for the largest error and for the root mean square, errors being distances from the reference in float64. NaN and
infinities must stand exactly where the reference, rounded to the dtype, has them. The floor is made of
- one unit in the last place: the dtype's epsilon times the largest (the root mean square) value of the reference, or
  the smallest subnormal number; for float64, where the judge computes no better than the judged, 64 units (1 -
  tanh(u)**2 loses that much);
- 2 x the error of the reference's own formulas in the accumulators' dtype (float32, or float64): what any honest sum
  costs. PyTorch may happen to sum in float64 on a CPU.

float32 is judged with IEEE products in force, PyTorch's and ours, whatever its settings say: on a GPU they let
convolutions round their operands to TF32, and which of cuDNN's kernels then do so is chance. TF32 is judged as a dtype
of its own, "tf32": float32 tensors, TF32 products in force. PyTorch's error alone cannot be the measure there, because
its kernel may have rounded nothing. The floor is this:
- TF32 keeps 10 bits of the mantissa, so that rounding an operand to the nearest costs at most 2**-11 of it, and a
  product of two at most 2**-10 of the product, about one unit of TF32. The same share of a sum would be too much to
  allow: errors of rounding have both signs and cancel, those of truncation do not, and truncation loses 0.7 x 2**-10 of
  a sum of one sign. So the reference's own formulas are computed in float32 with both operands of every product rounded
  to the nearest TF32, forward and backward (tf32.py), and the floor takes 2 x their error. It is 0 for operands that
  are TF32 numbers already, and for what multiplies nothing: norms and pools.
- 512 units of float32 for the last place, 2**-14, because matrix units add by truncation: 8 products at a time, a sum
  of one sign and of 4,096 products is truncated 512 times, by less than a unit each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, recording, reference
from ..dtypes import TF32, dtype_of, name_of
from ..precision import float32_products
from .capture import Captured, clone
from .computing import by_pytorch, by_reference, by_reference_in_tf32, by_us
from .report import FAIL, NOT_OURS, OK, CheckRow, Comparison

DIFFERENTIATED = ("input", "weight", "bias", "bn_weight", "bn_bias", "residual", "activation_arg")
BUFFERS = ("running_mean", "running_var")
GAMMA = {"conv_bn_act": "bn_weight", "bn_act": "weight", "batch_norm": "weight"}  # the norm's, by operation
MULTIPLYING = ("conv1d", "conv2d", "conv_transpose2d", "conv_bn_act", "conv_act")
UNITS = {"float64": 64.0, "tf32": 512.0}  # in the last place that the floor allows; of other dtypes 1


def judge(call: Captured, backward: bool = True, tf32: bool = False) -> CheckRow:
    """Runs `call` where its tensors are and judges it. Nothing is raised: a kernel that raises is a FAIL with its
    message.

    Our kernels serve wherever they can, also where the library was measured to be faster. tf32: float32 products are
    TF32.
    """
    shapes = " ".join("x".join(map(str, t.shape)) for name, t in call.tensors().items() if t.dim() > 1)
    row = CheckRow(call.layer, call.operation, shapes, name_of(call.dtype, tf32))
    try:
        with float32_products("tf32" if tf32 else "ieee"):
            for wanted, label in _runs(call, backward):
                row.reason = _judge_run(call, wanted, label, row)
                if row.reason:
                    row.verdict = NOT_OURS
                    return row
    except Exception as error:
        row.verdict, row.reason = FAIL, f"{type(error).__name__}: {error}".strip()
        return row
    row.verdict = OK if all(c.ok for c in row.comparisons) else FAIL
    return row


def _runs(call: Captured, backward: bool) -> list[tuple[tuple[str, ...], str]]:
    """Which gradients to ask for in each run, and what to call it: kernels may differ with what is asked."""
    runs: list[tuple[tuple[str, ...], str]] = [((), "")]
    names = tuple(name for name, t in call.tensors().items() if name in DIFFERENTIATED and t.is_floating_point())
    if backward and names:
        runs.append((names, " (with gradients)"))
        gamma = GAMMA.get(call.operation)
        if gamma in names and not call.training:
            runs.append((tuple(n for n in names if n != gamma), f" ({gamma} frozen)"))
    return runs


class _Evaluation:
    """One way of computing a call, forward and backward, in `dtype` or as captured."""

    def __init__(
        self, function: Callable, call: Captured, wanted: tuple[str, ...], dtype: torch.dtype | None = None
    ) -> None:
        self.call, self.wanted = call, wanted
        self.arguments = {name: self._argument(name, value, dtype) for name, value in call.arguments.items()}
        with call.computing(), torch.set_grad_enabled(bool(wanted)):
            out = function(call, self.arguments)
        outputs = out if isinstance(out, tuple) else (out,)
        self.output: Tensor = outputs[0]
        self.results = {name: t.detach() for name, t in zip(("output", "indices"), outputs, strict=False)}
        if call.training:
            self.results |= {name: self.arguments[name] for name in BUFFERS if self.arguments[name] is not None}

    def _argument(self, name: str, value: Any, dtype: torch.dtype | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = (
            value.to(dtype)
            if dtype is not None and value.is_floating_point() and value.dtype != dtype
            else clone(value)
        )
        return value.requires_grad_(name in self.wanted)

    def backward(self) -> None:
        dy = torch.empty_like(self.output).copy_(output_gradient(self.call, self.output))
        gradients = torch.autograd.grad(self.output, [self.arguments[name] for name in self.wanted], dy)
        self.results |= {f"grad of {name}": g for name, g in zip(self.wanted, gradients, strict=True)}


def output_gradient(call: Captured, output: Tensor) -> Tensor:
    """The same numbers every time, rounded to the call's dtype."""
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return dy.to(call.dtype).to(output.device)


# ----------------------------------------------------------------------------------------------------------------------
# Judgement


def _judge_run(call: Captured, wanted: tuple[str, ...], label: str, row: CheckRow) -> str:
    """Adds to `row`; returns why the call is not ours, or the empty string."""
    with dispatch.prefer_kernels():
        with recording.trace() as forward:
            ours = _Evaluation(by_us, call, wanted)
        empty = 0 in (ours.output.numel(), call.arguments["input"].numel())
        if reason := _not_ours(forward, empty, row.forward):
            return reason
        if wanted:
            with recording.trace() as backward:
                ours.backward()
            if reason := _not_ours(backward, empty, row.backward):
                return f"backward: {reason}"

    accumulators = torch.float64 if call.dtype == torch.float64 else torch.float32
    tf32 = row.dtype == TF32 and call.operation in MULTIPLYING
    theirs = _Evaluation(by_pytorch, call, wanted)
    exact = _Evaluation(by_reference, call, wanted, torch.float64)
    with float32_products("ieee"):  # what the reference rounds, it rounds itself
        plain = _Evaluation(by_reference_in_tf32 if tf32 else by_reference, call, wanted, accumulators)
        if wanted:
            plain.backward()
    if wanted:
        for evaluation in (theirs, exact):
            evaluation.backward()
    for name, result in ours.results.items():
        terms = _cancelled_terms(exact, name)
        results = (e.results[name] for e in (theirs, plain, exact))
        precision = name_of(call.dtype, tf32)
        row.comparisons.append(compare(name + label, result, *results, precision=precision, terms=terms))
    return ""


def _not_ours(trace: recording.Trace, empty: bool, launched: list[str]) -> str:
    """Why a call is not ours, or the empty string: PyTorch or its library served it, or no kernel ran. Adds the kernels
    to `launched`.
    """
    for served in trace:
        if served.served_by != "kernels":
            return served.reason
    launched += [name for name in kernels(trace) if name not in launched]
    return "" if empty or trace.launches else "no kernel was launched"


def kernels(trace: recording.Trace) -> list[str]:
    """The kernels that were launched, with their tiles, each once."""
    events = [event for call in trace for event in call.launches]
    return list(dict.fromkeys(f"{event.kernel} [{event.tile}]" if event.tile else event.kernel for event in events))


@torch.no_grad()
def _cancelled_terms(exact: _Evaluation, name: str) -> float:
    """How large the terms of a result are that is a sum which cancels, as far as is known; otherwise 0.

    Where it cancels, ours and PyTorch's are rounding noise in proportion to the terms, and the error of one is no
    measure for that of the other. The mean of a batch may be near zero, and its terms are the values of the batch. The
    gradient of a bias before a batch norm, which subtracts the mean, is exactly zero, and its terms are
    dy * bn_weight / std.
    """
    a, call = exact.arguments, exact.call
    if not call.training or name not in ("running_mean", "grad of bias"):
        return 0.0
    y = a["input"]
    if call.operation == "conv_bn_act":
        bias = a["bias"] if name == "running_mean" else None
        y = reference.conv2d(y, a["weight"], bias, a["stride"], a["padding"], a["dilation"], a["groups"])
    if name == "running_mean":
        return a["momentum"] * _norms(y)[1]
    if call.operation != "conv_bn_act":
        return 0.0
    scale = torch.rsqrt(y.var((0, 2, 3), unbiased=False) + a["eps"])
    scale = scale if a["bn_weight"] is None else scale * a["bn_weight"].abs()
    dy = output_gradient(call, exact.output).double()
    return float((dy.square().sum((0, 2, 3)).sqrt() * scale).max())


def compare(
    name: str, ours: Tensor, theirs: Tensor, plain: Tensor, exact: Tensor, *, precision: str, terms: float = 0.0
) -> Comparison:
    """Judges one tensor by the rule above.

    exact: the reference in float64; plain: its formulas in the accumulators' dtype, whose error the floor counts.
    precision: the name of the call's dtype, or "tf32". The unit in the last place is that of the largest result or, if
    that is larger, of summands of size `terms`.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Comparison(
            name, message=f"is {ours.dtype} {list(ours.shape)}, but PyTorch's is {theirs.dtype} {list(theirs.shape)}"
        )
    if not ours.is_floating_point():
        wrong = ours != exact
        return Comparison(
            name, message=f"{int(wrong.sum())} of {wrong.numel()} differ" if wrong.any() else "", position=_first(wrong)
        )
    expected = exact.to(ours.dtype).double()
    wrong = (
        (ours.isnan() != expected.isnan())
        | (ours.isinf() != expected.isinf())
        | (ours.isinf() & (ours.double() != expected))
    )
    if wrong.any():
        at = _first(wrong)
        count = f"{int(wrong.sum())} of {wrong.numel()} are not finite, or finite, wrongly"
        message = f"{count}: {float(ours[at])}, not {float(expected[at])}"
        return Comparison(name, message=message, position=at)

    finite = expected.isfinite()
    exact = torch.where(finite, exact, 0.0)
    errors = _errors(ours, exact, finite)
    error, rms = _norms(errors)
    torch_error, torch_rms = _norms(_errors(theirs, exact, finite))
    plain_error, plain_rms = _norms(_errors(plain, exact, finite))
    info = torch.finfo(dtype_of(precision))
    unit = info.eps * UNITS.get(precision, 1.0)
    largest, typical = (unit * max(size, terms) + info.tiny * info.eps for size in _norms(exact))
    return Comparison(
        name,
        error=error,
        torch_error=torch_error,
        limit=2 * torch_error + 2 * plain_error + largest,
        rms=rms,
        torch_rms=torch_rms,
        rms_limit=2 * torch_rms + 2 * plain_rms + typical,
        position=tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape)) if errors.numel() else (),
        largest=_norms(exact)[0],
    )


def _first(wrong: Tensor) -> tuple[int, ...]:
    return tuple(wrong.nonzero()[0].tolist()) if wrong.any() else ()


def _errors(t: Tensor, exact: Tensor, finite: Tensor) -> Tensor:
    """Distances where the result should be finite. One that is not finite there counts as 0, because PyTorch's own may
    overflow.
    """
    distance = (t.double() - exact).abs()
    return torch.where(finite & distance.isfinite(), distance, 0.0)


def _norms(t: Tensor) -> tuple[float, float]:
    """(largest absolute value, root mean square)."""
    if t.numel() == 0:
        return 0.0, 0.0
    return float(t.abs().max()), math.sqrt(float(t.double().square().mean()))
