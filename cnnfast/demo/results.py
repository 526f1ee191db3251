"""What a demo found, as data.

Errors are shown in units in the last place (ulp) of the dtype at the largest value of the tensor that they are in: that
value times the dtype's epsilon. So tensors of any size and dtype stand on one axis.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cnnfast.checking import CheckReport, Comparison
from cnnfast.checking.report import NOT_JUDGED, OK
from cnnfast.conversion import ConversionReport
from cnnfast.dtypes import TF32, dtype_of

from .costs import Costs
from .digits import ACCURACY_WANTED
from .effort import WHOLE, Effort
from .timing import Timing

TF32_EPSILON = 2.0**-10  # ten bits of mantissa


def in_units(error: float, largest: float, dtype: str) -> float:
    """An absolute error in ulp, of a tensor whose largest magnitude is `largest`. dtype: its name, or "tf32"."""
    if error == 0:
        return 0.0
    unit = largest * (TF32_EPSILON if dtype == TF32 else torch.finfo(dtype_of(dtype)).eps)
    return error / unit if unit else float("inf")


@dataclass
class Training:
    """A training run. Each of `mistakes` is (index among scikit-learn's images, digit, what the network read); accuracy
    is that on the held-out part.
    """

    seed: int
    images: int
    held_out: int
    losses: list[float]
    mistakes: list[tuple[int, int, int]]
    served_by: str
    seconds: float

    @property
    def accuracy(self) -> float:
        return 1 - len(self.mistakes) / self.held_out

    @property
    def ok(self) -> bool:
        return self.accuracy >= ACCURACY_WANTED


@dataclass
class Proof:
    """A check of some layers on real images. `title` says what went through which layers, `subject` does in a word;
    dtype "tf32" is float32 with TF32 products.
    """

    title: str
    subject: str
    dtype: str
    report: CheckReport
    seconds: float

    @property
    def launches(self) -> dict[str, int]:
        """Kernels with their tiles, and how many of the calls, forward or backward, launched each."""
        return dict(Counter(kernel for row in self.report.rows for kernel in (*row.forward, *row.backward)))


@dataclass
class Maps:
    """The photograph in a ResNet's first layers, by our kernels. size: of the photograph, "H x W". comparisons: of the
    maps after the stem and after the block, by check's rule, in which PyTorch's own error stands for that of the plain
    formulas.
    """

    size: str
    comparisons: list[Comparison]
    launches: list[str]

    @property
    def errors(self) -> tuple[float, float]:
        """The largest of ours and the largest of PyTorch's, in ulp of float32."""
        ours = max(in_units(c.error, c.largest, "float32") for c in self.comparisons)
        return ours, max(in_units(c.torch_error, c.largest, "float32") for c in self.comparisons)

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons)


@dataclass
class Conversion:
    """The same network in plain torch.nn, converted: it reads `same` of `digits` digits as PyTorch does. kernels:
    whether any can run here; without triton none can.
    """

    digits: int
    same: int
    launches: list[str]
    report: ConversionReport
    kernels: bool = True

    @property
    def summary(self) -> str:
        return f"{self.same} of {self.digits} digits read as by PyTorch; {self.report.summary}"

    @property
    def ok(self) -> bool:
        return self.same == self.digits and bool(self.launches) == self.kernels and self.report.count("left") == 0


MOST_APART = 0.1  # levels; two that are one level apart are the nearest that an image file can tell


@dataclass
class Augmentation:
    """`count` views of the photograph, size x size pixels each, in one batch. The first `by_kernels` of them were
    computed by our kernels too: apart is the largest difference from PyTorch's, in levels from 0 to 255. milliseconds:
    of one batch, by the name of who made it. served_by: who computed the batch that was timed. kernels: whether any can
    run here.
    """

    count: int
    size: int
    by_kernels: int
    launches: list[str]
    apart: float
    milliseconds: dict[str, float]
    served_by: str
    kernels: bool = True

    @property
    def ok(self) -> bool:
        return self.apart <= MOST_APART and bool(self.launches) == self.kernels


@dataclass
class Known:
    """A known model, converted."""

    name: str
    report: ConversionReport

    @property
    def convolutions(self) -> str:
        fused, all_of_them = self.report.count("fused"), sum(row.convolution for row in self.report.rows)
        return f"{fused} of {all_of_them} convolutions fused"

    @property
    def coverage(self) -> float:
        """The share of the FLOPs that have our forward."""
        return self.report.coverage or 0.0


@dataclass
class Results:
    """`environment` says where this ran. `timings` is empty without a GPU; `proofs` is empty without triton; `known` is
    None where its library is not installed.
    """

    environment: dict[str, str]
    training: Training
    effort: Effort = WHOLE
    maps: Maps | None = None
    proofs: list[Proof] = field(default_factory=list)
    conversion: Conversion | None = None
    augmentation: Augmentation | None = None
    known: Known | None = None
    costs: Costs | None = None
    timings: list[Timing] = field(default_factory=list)
    timed: str = ""
    seconds: float = 0.0

    def worst(self, backward: bool) -> tuple[float, float] | None:
        """The largest error of ours in ulp, and the largest of PyTorch's; None if nothing was judged in that
        direction.
        """
        found = [(c, p.dtype) for p in self.proofs for row in p.report.rows for c in row.comparisons]
        found = [(c, dtype) for c, dtype in found if c.backward == backward and c.limit]
        if not found:
            return None
        ours = max(in_units(c.error, c.largest, dtype) for c, dtype in found)
        return ours, max(in_units(c.torch_error, c.largest, dtype) for c, dtype in found)

    @property
    def held(self) -> tuple[int, int]:
        """(checks that hold, all checks): of each call, in every dtype, and of each step of a whole model."""
        rows = [row for p in self.proofs for row in (*p.report.rows, *p.report.whole) if row.verdict != NOT_JUDGED]
        return sum(row.verdict == OK for row in rows), len(rows)

    @property
    def errors(self) -> dict[str, Any]:
        """The largest of each direction, and their unit. None stands for an infinite number of units."""
        found: dict[str, Any] = {"unit": "ulp: the dtype's epsilon times the largest value of the tensor"}
        for name, backward in (("forward", False), ("backward", True)):
            if (worst := self.worst(backward)) is not None:
                ours, theirs = (None if math.isinf(units) else units for units in worst)
                found[name] = {"ours": ours, "pytorch": theirs}
        return found

    @property
    def left_out(self) -> str:
        """Which timings there was no time for, and why; "" if all were made."""
        reasons = dict.fromkeys(t.left_out for t in self.timings if t.left_out)
        named = ("; ".join(t.layer for t in self.timings if t.left_out == reason) for reason in reasons)
        return " ".join(f"Left out, because {reason}: {layers}." for reason, layers in zip(reasons, named, strict=True))

    @property
    def failed(self) -> list[str]:
        """What does not hold, by the words under which it is told."""
        parts = {
            "held out": self.training.ok,
            "photograph": self.maps is None or self.maps.ok,
            "judged": all(p.report.ok for p in self.proofs),
            "convert": self.conversion is None or self.conversion.ok,
            "augment": self.augmentation is None or self.augmentation.ok,
            "times": all(t.right for t in self.timings),
        }
        return [name for name, ok in parts.items() if not ok]

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> str:
        proofs = [
            {
                "title": p.title,
                "subject": p.subject,
                "dtype": p.dtype,
                "seconds": p.seconds,
                "launches": p.launches,
                "check": json.loads(p.report.to_json()),
            }
            for p in self.proofs
        ]
        c, known, views = self.conversion, self.known, self.augmentation
        data: dict[str, Any] = {
            "ok": self.ok,
            "failed": self.failed,
            "seconds": self.seconds,
            "environment": self.environment,
            "training": {**asdict(self.training), "accuracy": self.training.accuracy, "wanted": ACCURACY_WANTED},
            "effort": asdict(self.effort),
            "maps": None if self.maps is None else {**asdict(self.maps), "ok": self.maps.ok},
            "errors": self.errors,
            "proofs": proofs,
            "conversion": None if c is None else {**vars(c), "ok": c.ok, "report": json.loads(c.report.to_json())},
            "known": None if known is None else {"name": known.name, "report": json.loads(known.report.to_json())},
            "augmentation": None if views is None else {**asdict(views), "ok": views.ok},
            "costs": None if self.costs is None else self.costs.as_dict(),
            "timed": self.timed,
            "timings": [asdict(t) for t in self.timings],
            "left_out": self.left_out,
        }
        return json.dumps(data, indent=1, allow_nan=False)
