"""Judges a converted model as a whole, beside the original: state, outputs, gradients, statistics.

Conversion may break what no single call shows: it may forget a residual, update a frozen statistic, rename a key. So
the original and the converted model take the same steps from the same state:

    state      keys, order, shapes, dtypes and values of state_dict, each loading the other's; names, order, sharing
               and requires_grad of the parameters; buffers; training flags
    infer      the output, in eval mode, without gradients; no buffer changes
    train      the output, the buffers after it, and the gradients of all parameters and inputs
    as given   the same, if some modules of the model are in training and others are not

Everything is judged by the rule of judge.py: no worse than twice PyTorch's own error in the same dtype plus a floor,
errors being distances from the original in float64. The floor has a part that a single call does not need, found by
running the original in float64 again, moved about at random: every parameter and input by u of its value, what each
layer returns, and the gradient that returns to it, by u of its root mean square and the smallest number of the dtype.
- u is one unit of the dtype, or SUM units of the accumulators' (float32, float64): what honest roundings and sums cost,
  which deep networks amplify, and which PyTorch itself may have escaped by luck. Of TF32 products, which are judged
  apart from IEEE ones as judge.py has it, u is a unit of TF32, 2**-10.
- For gradients u is at least KINK. A gradient jumps where an activation passes through the kink of a ReLU, or another
  pixel becomes the largest of its window, and which of the activations nearest to a kink do so in float32 is chance.
  float64 has no such cases: there, gradients are judged to the last digits.
Random numbers are the same in all runs; a model that is still random is not judged, and the report says so.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import dispatch
from ..conversion import convert
from ..dtypes import TF32, name_of
from ..modes import INFER, TRAIN
from ..precision import UNIT as TF32_UNIT
from ..precision import float32_products
from .judge import compare, kernels
from .moving import Mover
from .outcome import RunOutcome, deviation, distance, named_tensors, outcome_of
from .report import FAIL, NOT_JUDGED, NOT_OURS, OK, CheckRow, Comparison
from .state import compare_states

STATE, AS_GIVEN = "state", "as given"  # and the two modes
SAMPLES = 3  # runs that are moved about
SUM = 64  # units of the accumulators' dtype: see above
KINK = 2.0**-13
# Two runs in float64 whose relative difference is smaller are the same: sums in another order, by a GPU's atomics, are
# not random numbers.
ALIKE = 1e-9
BEYOND = 100  # rounding cannot change a result by more than so many times what moving the model about changes
CHAOS = 0.5  # a result that moving the model about changes by a larger share tells nothing
SMALLEST_SCALE = 2.0**-32  # of the gradient that backward starts from

Watch = Callable[[str], None]


def steps(model: nn.Module, backward: bool) -> list[str]:
    """The steps that are judged of `model`, each a row."""
    flags = {module.training for module in model.modules()}
    training = [TRAIN] if backward or True in flags else []
    return [STATE, INFER, *training, *([AS_GIVEN] if len(flags) > 1 else [])]


def judge_conversion(
    model: nn.Module,
    inputs: tuple[Any, ...],
    backward: bool = True,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    tf32: bool = False,
) -> Iterator[CheckRow]:
    """The rows of `judge_whole` for a copy of `model` and for what cnnfast.convert makes of another copy."""
    try:
        converted = convert(copy.deepcopy(model))
    except (TypeError, ValueError) as refused:
        yield CheckRow("", STATE, "", "", NOT_JUDGED, f"convert: {refused}")
    else:
        yield from judge_whole(copy.deepcopy(model), converted, inputs, backward, dtype, watch, tf32)


def judge_whole(
    original: nn.Module,
    converted: nn.Module,
    inputs: tuple[Any, ...],
    backward: bool = True,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    tf32: bool = False,
) -> Iterator[CheckRow]:
    """One row for each step. Both models are copied for every run and stay as they are.

    Our kernels serve every call of the converted model that they can, also where the library was measured to be faster.

    inputs: what both take, tensors or structures of them. backward: judge gradients too, and training even if
    `original` is in eval. dtype: of the copies and their floating inputs; None: as they are. tf32: float32 products are
    TF32, otherwise IEEE. watch: called with what is being done, at every launch of a kernel. Nothing is raised for what
    `converted` does wrong: that is a FAIL with its message.
    """
    for step in steps(original, backward):
        if step == STATE:
            compared = compare_states(original, converted)
            yield CheckRow("", STATE, "", "", OK if all(c.ok for c in compared) else FAIL, comparisons=compared)
            continue
        with _watched(step, watch), float32_products("tf32" if tf32 else "ieee"):
            row = _Step(original, converted, inputs, step, backward and step != INFER, dtype, tf32).judged()
        yield row


@contextmanager
def _watched(step: str, watch: Watch | None) -> Iterator[None]:
    count = itertools.count(1)
    if watch is None or dispatch.launch is None:
        yield
    else:
        with dispatch.launch.observe(lambda _: watch(f"{step}: {next(count)} kernels")):
            yield


class _Step:
    """One step that both models take, and its judgement."""

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        inputs: Any,
        mode: str,
        backward: bool,
        dtype: torch.dtype | None,
        tf32: bool = False,
    ) -> None:
        self.original, self.converted = (
            copy.deepcopy(model).to(dtype) if dtype else model for model in (original, converted)
        )
        self.inputs = tree_map_only(
            Tensor, lambda t: t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach(), inputs
        )
        self.mode, self.backward = mode, backward
        tensors = [
            t
            for t in (*self.original.parameters(), *tree_leaves(self.inputs))
            if isinstance(t, Tensor) and t.is_floating_point()
        ]
        self.dtype = max(
            (t.dtype for t in tensors), key=lambda d: torch.finfo(d).eps, default=torch.get_default_dtype()
        )
        accumulators = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.scale = 1.0
        self.precision = name_of(self.dtype, tf32)
        unit = TF32_UNIT if self.precision == TF32 else torch.finfo(self.dtype).eps
        self.unit = max(unit, SUM * torch.finfo(accumulators).eps)

    def judged(self) -> CheckRow:
        shapes = " ".join("x".join(map(str, t.shape)) for t in named_tensors("", self.inputs).values())
        row = CheckRow("", self.mode, shapes, self.precision)
        theirs = exact = RunOutcome()
        samples: dict[float, list[RunOutcome]] = {}
        try:
            theirs = self.scaled()
            exact = self.run(self.original, exact=True)
            samples = {unit: self.moved(unit) for unit in {self.unit, self.gradient_unit}}
            row.reason = self.randomness(theirs, exact, samples[self.unit]) or self.chaos(exact, samples[self.unit])
        except Exception as error:
            row.reason = f"the original itself raises {type(error).__name__}: {error}".strip()
        if row.reason:
            row.verdict = NOT_JUDGED
            return row
        try:
            ours = self.run(self.converted, ours=True)
        except Exception as error:
            row.verdict, row.reason = FAIL, f"{type(error).__name__}: {error}".strip()
            return row
        row.forward, row.backward = kernels(ours.forward), kernels(ours.backward)
        row.comparisons = list(self.compare(ours, theirs, exact, samples))
        if not all(c.ok for c in row.comparisons):
            row.verdict = FAIL
        elif any(call.served_by == "kernels" for call in ours.forward):
            row.verdict = OK
        else:
            row.verdict, row.reason = NOT_OURS, "none of its calls was served by our kernels"
        return row

    def scaled(self) -> RunOutcome:
        """PyTorch's outcome. Finds a scale of the gradients with which none overflows: float16 needs that."""
        outcome = self.run(self.original)
        while self.scale > SMALLEST_SCALE and any(
            not t.isfinite().all() for name, t in outcome.tensors.items() if name.startswith("grad")
        ):
            self.scale /= 2**8  # more than enough, for ours may be somewhat larger
            outcome = self.run(self.original)
        return outcome

    @property
    def gradient_unit(self) -> float:
        return self.unit if not self.backward or self.dtype == torch.float64 else max(self.unit, KINK)

    def moved(self, unit: float) -> list[RunOutcome]:
        info = torch.finfo(self.dtype)
        return [
            self.run(self.original, exact=True, mover=Mover(unit, info.tiny * info.eps, seed))
            for seed in range(SAMPLES)
        ]

    def run(
        self, model: nn.Module, *, ours: bool = False, exact: bool = False, mover: Mover | None = None
    ) -> RunOutcome:
        """Runs a copy of `model` in this step's mode: by our kernels if `ours`, in float64 if `exact`, moved about by
        `mover`.
        """
        model, inputs = copy.deepcopy(model), self.inputs
        if exact:
            model = model.double()
            inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        if mover is not None:
            mover.move(model)
            inputs = tree_map_only(Tensor, mover.moved, inputs)
        if self.mode != AS_GIVEN:
            model.train(self.mode == TRAIN)
        with dispatch.prefer_kernels() if ours else dispatch.backend("torch"):
            return outcome_of(model, inputs, self.output_gradient if self.backward else None)

    def output_gradient(self, output: Tensor, seed: int) -> Tensor:
        """The same numbers in every run, rounded to the step's dtype."""
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        return torch.empty_like(output).copy_(dy * self.scale)

    def randomness(self, theirs: RunOutcome, exact: RunOutcome, samples: list[RunOutcome]) -> str:
        """Why the original is too random to be judged, or the empty string."""
        if deviation(exact, self.run(self.original, exact=True)) > ALIKE:
            return "random: with the same seed the original gives other numbers the second time"
        if deviation(exact, theirs) > BEYOND * max(deviation(exact, run) for run in samples):
            what = f"the original gives other numbers in {self.precision} than in float64"
            return f"{what}, and not by rounding: random ones, perhaps"
        return ""

    def chaos(self, exact: RunOutcome, samples: list[RunOutcome]) -> str:
        """Why rounding alone decides the results, or the empty string."""
        for what in ("output", "gradients"):
            names = [name for name, t in exact.tensors.items() if name.startswith(what[:4]) and t.is_floating_point()]
            size = math.hypot(*(float(exact.tensors[name].norm()) for name in names))
            for run in samples:
                change = math.hypot(*(float((run.tensors[name] - exact.tensors[name]).norm()) for name in names))
                if change > CHAOS * size:
                    advice = "that tells nothing; a larger input may, or another dtype"
                    return f"rounding alone changes the {what} by {change / max(size, 1e-300):.0%}: {advice}"
        return ""

    def compare(
        self, ours: RunOutcome, theirs: RunOutcome, exact: RunOutcome, samples: dict[float, list[RunOutcome]]
    ) -> Iterator[Comparison]:
        for name in dict.fromkeys([*theirs.tensors, *ours.tensors]):
            mine, right = ours.tensors.get(name), theirs.tensors.get(name)
            if mine is None or right is None:
                yield Comparison(name, message="is missing" if mine is None else "is there, but PyTorch has none")
                continue
            best = exact.tensors.get(name)
            if best is None or best.shape != right.shape:  # the values decide how many there are
                continue
            plain = best
            if right.is_floating_point():
                moved = [
                    run.tensors.get(name, best)
                    for run in samples[self.gradient_unit if name.startswith("grad") else self.unit]
                ]
                plain = max(
                    (t for t in moved if t.shape == best.shape), key=functools.partial(distance, best), default=best
                )
            elif (
                mine.shape == right.shape
            ):  # where float64 and PyTorch disagree, rounding decides: nothing is judged there
                mine = torch.where(right == best, mine, best)
            yield compare(name, mine, right, plain, best, precision=name_of(mine.dtype, self.precision == TF32))
