"""Judges a converted model as a whole, beside the original: state, outputs, gradients, statistics.

What conversion may break, and no single call shows: a forgotten residual, a statistic updated though frozen, a renamed
key. So the original and the converted model take the same steps from the same state:

    state      keys, order, shapes, dtypes and values of state_dict, each loading the other's; names, order, sharing and requires_grad
               of the parameters; buffers; training flags
    eval       the output, without gradients; no buffer changes
    training   the output, the buffers after it, and the gradients of all parameters and inputs
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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map_only

from .. import dispatch, recording
from ..conversion import convert
from ..dtypes import TF32, name_of
from ..precision import UNIT as TF32_UNIT
from ..precision import float32_products
from .capture import clone
from .judge import compare, kernels
from .randomness import reproducible
from .report import FAIL, NOT_JUDGED, NOT_OURS, OK, CheckRow, Comparison
from .state import compare_states

STATE, EVAL, TRAINING, AS_GIVEN = "state", "eval", "training", "as given"
SAMPLES = 3  # runs that are moved about
SUM = 64
KINK = 2.0**-13
# two runs in float64 that differ by less, relatively, are the same: a GPU's atomics are not random numbers
ALIKE = 1e-9
BEYOND = 100  # times what being moved about changes: more than rounding can
CHAOS = 0.5  # a result that being moved about changes by more, relatively, tells nothing
SMALLEST_SCALE = 2.0**-32  # of the gradient that backward starts from

Watch = Callable[[str], None]


def steps(model: nn.Module, backward: bool) -> list[str]:
    """What is judged of `model`, a row each."""
    flags = {module.training for module in model.modules()}
    training = [TRAINING] if backward or True in flags else []
    return [STATE, EVAL, *training, *([AS_GIVEN] if len(flags) > 1 else [])]


def judge_conversion(
    model: nn.Module,
    inputs: tuple[Any, ...],
    backward: bool = True,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    tf32: bool = False,
) -> Iterator[CheckRow]:
    """What `judge_whole` says of a copy of `model` and what cnnfast.convert makes of another."""
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
    """One row a step. Both models are copied for every run and stay as they are.

    Of the converted model's calls our kernels serve all that they can, also those for which the library was measured to
    be faster.

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
            row = _Step(original, converted, inputs, step, backward and step != EVAL, dtype, tf32).judged()
        yield row


@contextmanager
def _watched(step: str, watch: Watch | None) -> Iterator[None]:
    count = itertools.count(1)
    if watch is None or dispatch.launch is None:
        yield
    else:
        with dispatch.launch.observe(lambda _: watch(f"{step}: {next(count)} kernels")):
            yield


@dataclass
class _Outcome:
    """What one run of a model leaves, by name; a gradient that does not exist is missing."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    forward: recording.Trace = field(default_factory=recording.Trace)
    backward: recording.Trace = field(default_factory=recording.Trace)


class _Step:
    """One step of both models."""

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
        row = CheckRow(
            "",
            self.mode,
            " ".join("x".join(map(str, t.shape)) for t in _tensors("", self.inputs).values()),
            self.precision,
        )
        theirs = exact = _Outcome()
        samples: dict[float, list[_Outcome]] = {}
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

    def scaled(self) -> _Outcome:
        """PyTorch's outcome, the scale of all gradients being such that none overflows: in float16 training needs that."""
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

    def moved(self, unit: float) -> list[_Outcome]:
        info = torch.finfo(self.dtype)
        return [
            self.run(self.original, exact=True, mover=_Mover(unit, info.tiny * info.eps, seed))
            for seed in range(SAMPLES)
        ]

    def run(
        self, model: nn.Module, *, ours: bool = False, exact: bool = False, mover: _Mover | None = None
    ) -> _Outcome:
        """A copy of `model` in this step's mode: by our kernels if `ours`, in float64 if `exact`, moved about by
        `mover`.
        """
        model, inputs = copy.deepcopy(model), self.inputs
        if exact:
            model, inputs = (
                model.double(),
                tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs),
            )
        if mover is not None:
            mover.move(model)
            inputs = tree_map_only(Tensor, mover.moved, inputs)
        if self.mode != AS_GIVEN:
            model.train(self.mode == TRAINING)
        leaves = tree_map_only(
            Tensor, lambda t: clone(t).requires_grad_(self.backward and t.is_floating_point()), inputs
        )
        wanted = {
            name: t for name, t in (*_tensors("input", leaves).items(), *model.named_parameters()) if t.requires_grad
        }
        outcome = _Outcome()
        with (
            reproducible(0),
            dispatch.prefer_kernels() if ours else dispatch.backend("torch"),
            torch.set_grad_enabled(self.backward),
        ):
            given = tree_map_only(Tensor, Tensor.clone, leaves)  # the model may write into them
            with recording.trace() as outcome.forward:
                outputs = _tensors("output", model(*given))
            after = {f"{name} afterwards": t for name, t in _tensors("input", given).items()}
            outcome.tensors = {
                name: t.detach().clone() for name, t in (*outputs.items(), *after.items(), *model.named_buffers())
            }
            outputs = [t for t in outputs.values() if t.requires_grad]
            if outputs:
                dy = [self.output_gradient(t, i) for i, t in enumerate(outputs)]
                with recording.trace() as outcome.backward:
                    gradients = torch.autograd.grad(outputs, list(wanted.values()), dy, allow_unused=True)
                outcome.tensors |= {
                    f"grad of {name}": g for name, g in zip(wanted, gradients, strict=True) if g is not None
                }
        return outcome

    def output_gradient(self, output: Tensor, seed: int) -> Tensor:
        """The same numbers in every run, rounded to the step's dtype."""
        dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        return torch.empty_like(output).copy_(dy * self.scale)

    def randomness(self, theirs: _Outcome, exact: _Outcome, samples: list[_Outcome]) -> str:
        """Why the original is too random to be judged, or the empty string."""
        if _deviation(exact, self.run(self.original, exact=True)) > ALIKE:
            return "random: with the same seed the original gives other numbers the second time"
        if _deviation(exact, theirs) > BEYOND * max(_deviation(exact, run) for run in samples):
            return f"the original gives other numbers in {self.precision} than in float64, and not by rounding: random ones, perhaps"
        return ""

    def chaos(self, exact: _Outcome, samples: list[_Outcome]) -> str:
        """Why rounding alone decides what comes out, or the empty string."""
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
        self, ours: _Outcome, theirs: _Outcome, exact: _Outcome, samples: dict[float, list[_Outcome]]
    ) -> Iterator[Comparison]:
        for name in dict.fromkeys([*theirs.tensors, *ours.tensors]):
            mine, right = ours.tensors.get(name), theirs.tensors.get(name)
            if mine is None or right is None:
                yield Comparison(name, message="is missing" if mine is None else "is there, but PyTorch has none")
                continue
            best = exact.tensors.get(name)
            if best is None or best.shape != right.shape:  # where values decide how much there is
                continue
            plain = best
            if right.is_floating_point():
                moved = [
                    run.tensors.get(name, best)
                    for run in samples[self.gradient_unit if name.startswith("grad") else self.unit]
                ]
                plain = max(
                    (t for t in moved if t.shape == best.shape), key=functools.partial(_distance, best), default=best
                )
            elif mine.shape == right.shape:  # what float64 decides otherwise than PyTorch, rounding decides
                mine = torch.where(right == best, mine, best)
            yield compare(name, mine, right, plain, best, precision=name_of(mine.dtype, self.precision == TF32))


class _Mover:
    """Moves a model in float64 about as rounding may, by `unit` of each value and by `least`; the same way for the same
    seed.
    """

    def __init__(self, unit: float, least: float, seed: int) -> None:
        self.unit, self.least, self.seed = unit, least, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def signs(self, t: Tensor) -> Tensor:
        if t.device not in self.generators:
            self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
        return torch.randint(0, 2, t.shape, generator=self.generators[t.device], device=t.device) * 2 - 1

    def moved(self, t: Tensor) -> Tensor:
        return t * (1 + self.unit * self.signs(t)) if t.is_floating_point() else t

    @torch.no_grad()
    def move(self, model: nn.Module) -> None:
        """All parameters and buffers, and from now on what comes out of each leaf that has parameters."""
        for t in (*model.parameters(), *model.buffers()):
            t.copy_(self.moved(t))
        for module in model.modules():
            if module._parameters and not module._modules:
                module.register_forward_hook(lambda module, args, output: tree_map_only(Tensor, self.rounded, output))

    def rounded(self, t: Tensor) -> Tensor:
        """With noise, and likewise the gradient that comes back."""
        if not t.is_floating_point():
            return t
        moved = t + self.noise(t)
        if moved.requires_grad:
            moved.register_hook(lambda g: g + self.noise(g))
        return moved

    def noise(self, t: Tensor) -> Tensor:
        """In units of its typical value: a sum's error does not shrink where its terms cancel."""
        return (self.unit * t.detach().square().mean().sqrt() + self.least) * self.signs(t)


def _tensors(name: str, tree: Any) -> dict[str, Tensor]:
    """By name and path in the structure that holds them; a complex one as its real and imaginary parts."""
    found = [(path, t) for path, t in tree_flatten_with_path(tree)[0] if isinstance(t, Tensor)]
    found = [(path, torch.view_as_real(t) if t.is_complex() else t) for path, t in found]
    return {name + (keystr(path) if len(found) > 1 else ""): t for path, t in found}


def _distance(t: Tensor, u: Tensor) -> float:
    return float((t - u).square().nansum())


def _deviation(a: _Outcome, b: _Outcome) -> float:
    """Relative root mean square of the difference, of the output or buffer that differs most."""
    names = [
        name
        for name, t in a.tensors.items()
        if name in b.tensors and t.is_floating_point() and not name.startswith("grad")
    ]
    return max((_relative(a.tensors[name], b.tensors[name]) for name in names), default=0.0)


def _relative(t: Tensor, u: Tensor) -> float:
    """Of the finite; infinite if the shapes differ."""
    if t.shape != u.shape:
        return math.inf
    t, u = (x.double().where(t.isfinite() & u.isfinite(), 0.0) for x in (t, u))
    return float((t - u).norm() / t.norm().clamp_min(1e-300))
