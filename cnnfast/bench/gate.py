"""The gate before any timing: a provider whose numbers are wrong gets no time.

Outputs and gradients are compared with the model in float64. For every tensor, in relative errors |ours - exact| /
|exact| (norms over all elements), the rule is:

    error <= 2 x error of plain PyTorch in the same dtype + 2 x the same of all tensors together + floor

Plain PyTorch is the model as it is: NCHW, eager, and by the algorithms that cuDNN takes if it does not try them all,
which takes seconds, and these calls are not timed. It multiplies float32 as the providers do: IEEE or TF32, whichever
is in force.

The floor is a sum of three. A few units of the dtype (of TF32 where its products are in force, since PyTorch's kernel
may have rounded nothing). SUM units of float32, for sums in another order. And in a training step, or a block's, KINK:
which of the activations nearest to a ReLU's kink pass it is chance, and one of a hundred positions is a tenth of a
channel's gradient. A tensor that is small beside the others is measured as if it were not: the gradient of a bias
before a batch norm is exactly zero, and whatever is computed for it is rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dtypes import name_of
from ..measuring.timing import cudnn_benchmark
from ..precision import UNIT as TF32_UNIT
from ..precision import float32_products
from .job import STEP, Job, placed, step_of

UNITS = 4
SUM = 64
KINK = 2.0**-5
IMAGES = 8  # that are compared in eval mode, where no image depends on another
SMALL = 0.01


@dataclass(frozen=True)
class Verdict:
    """error: the largest relative one. message: what is wrong, or the empty string."""

    error: float
    message: str


@dataclass(frozen=True)
class Expected:
    """What is right. exact: the results in float64, outputs before gradients. plain: PyTorch's own relative errors.
    precision: the name of the dtype of `exact`. images: how many of each tensor are compared; None for all.
    """

    exact: list[Tensor]
    plain: list[float]
    floor: float
    precision: str
    images: int | None

    def judge(self, results: Sequence[Tensor]) -> Verdict:
        if len(results) != len(self.exact):
            return Verdict(math.inf, f"{len(results)} tensors come out, not {len(self.exact)}")
        results = [t.detach()[: self.images] for t in results]
        for i, (ours, exact) in enumerate(zip(results, self.exact, strict=True)):
            if ours.shape != exact.shape:
                return Verdict(math.inf, f"tensor {i} is {list(ours.shape)}, not {list(exact.shape)}")
        errors = relative_errors(results, self.exact)
        together = _mean(self.plain)
        excess = [
            error / (2 * plain + 2 * together + self.floor) for error, plain in zip(errors, self.plain, strict=True)
        ]
        worst = max(range(len(errors)), key=lambda i: excess[i] if excess[i] == excess[i] else math.inf)
        if excess[worst] <= 1:
            return Verdict(max(errors), "")
        return Verdict(
            errors[worst], f"tensor {worst} is off by {errors[worst]:.1e}, PyTorch's own by {self.plain[worst]:.1e}"
        )


def expect(job: Job) -> Expected:
    """Runs the job's model twice: in float64 (or float32, if memory does not suffice), and in the job's dtype.

    Raises what the model raises, and ValueError if PyTorch's own results are not finite or no better than noise.
    """
    images = IMAGES if job.mode == "infer" else None
    exact, precision = None, torch.float64
    try:
        exact = _exact(job, precision, images)
    except torch.cuda.OutOfMemoryError:
        precision = torch.float32
    if exact is None:  # not inside `except`: while an error is handled, what was allocated stays alive
        exact = _exact(job, precision, images)
    model = placed(job.model, job)
    with cudnn_benchmark(False):
        plain = [
            t.detach() for t in step_of(job, model, model, [t[:images] for t in job.inputs(channels_last=False)])()
        ]
    errors = relative_errors(plain, exact)
    if not max(errors, default=math.inf) < 1:
        off = f"{max(errors, default=math.inf):.1g}"
        raise ValueError(f"PyTorch's own results in {job.precision} are off by {off}: nothing to judge by")
    unit = TF32_UNIT if job.tf32 else torch.finfo(job.dtype).eps
    floor = UNITS * unit + SUM * torch.finfo(torch.float32).eps + KINK * (job.mode in ("train", STEP))
    return Expected(exact, errors, floor, name_of(precision), images)


def _exact(job: Job, precision: torch.dtype, images: int | None) -> list[Tensor]:
    model = copy.deepcopy(job.model).to(job.device, precision).train(job.mode != "infer")
    inputs = [t[:images].to(precision) for t in job.inputs(channels_last=False)]
    exact = replace(job, dtype=precision)
    with float32_products("ieee"), cudnn_benchmark(False):
        return [t.detach() for t in step_of(exact, model, model, inputs)()]


def relative_errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The error of each result, by norms; infinite for one that is not finite."""
    sizes = [float(t.norm()) / max(1, t.numel()) ** 0.5 for t in exact]
    least = SMALL * _mean(sizes)
    errors = []
    for ours, right, size in zip(results, exact, sizes, strict=True):
        distance = float((ours.to(right.dtype) - right).norm()) / max(1, right.numel()) ** 0.5
        errors.append(distance / max(size, least, 1e-300) if math.isfinite(distance) else math.inf)
    return errors


def _mean(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values)) if values else 0.0
