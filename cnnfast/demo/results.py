"""What a demo found, as data."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from cnnfast.checking import CheckReport, Comparison
from cnnfast.conversion import ConversionReport

from .digits import ACCURACY_WANTED
from .timing import Timing


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
    """A check of some layers on real images. `title` says what went through which layers; dtype "tf32" is float32 with
    TF32 products.
    """

    title: str
    dtype: str
    report: CheckReport
    seconds: float

    @property
    def launches(self) -> dict[str, int]:
        """Kernels with their tiles, and how many of the calls, forward or backward, launched each."""
        return dict(Counter(kernel for row in self.report.rows for kernel in (*row.forward, *row.backward)))


@dataclass
class Conversion:
    """The same network in plain torch.nn, converted: it reads `same` of `digits` digits as PyTorch does."""

    digits: int
    same: int
    launches: list[str]
    report: ConversionReport
    seconds: float

    @property
    def summary(self) -> str:
        return f"{self.same} of {self.digits} digits read as by PyTorch; {self.report.summary}"

    @property
    def ok(self) -> bool:
        return self.same == self.digits and bool(self.launches) and self.report.count("left") == 0


@dataclass
class Results:
    """`environment` says where this ran. `timings` is empty without a GPU; `proofs` is empty, and `conversion` None,
    without triton.
    """

    environment: dict[str, str]
    training: Training
    proofs: list[Proof] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    timed: str = ""
    seconds: float = 0.0
    conversion: Conversion | None = None

    @property
    def left_out(self) -> str:
        """Which timings there was no time for, and why; "" if all were made."""
        reasons = dict.fromkeys(t.left_out for t in self.timings if t.left_out)
        named = ("; ".join(t.layer for t in self.timings if t.left_out == reason) for reason in reasons)
        return " ".join(f"Left out, because {reason}: {layers}." for reason, layers in zip(reasons, named, strict=True))

    @property
    def ok(self) -> bool:
        parts = [self.training.ok, *(p.report.ok for p in self.proofs), *(t.right for t in self.timings)]
        return all(parts) and (self.conversion is None or self.conversion.ok)

    def to_json(self) -> str:
        proofs = [
            {
                "title": p.title,
                "dtype": p.dtype,
                "seconds": p.seconds,
                "launches": p.launches,
                "check": json.loads(p.report.to_json()),
            }
            for p in self.proofs
        ]
        c = self.conversion
        data: dict[str, Any] = {
            "ok": self.ok,
            "seconds": self.seconds,
            "environment": self.environment,
            "training": {**asdict(self.training), "accuracy": self.training.accuracy, "wanted": ACCURACY_WANTED},
            "proofs": proofs,
            "conversion": None if c is None else {**vars(c), "ok": c.ok, "report": json.loads(c.report.to_json())},
            "timed": self.timed,
            "timings": [asdict(t) for t in self.timings],
            "left_out": self.left_out,
        }
        return json.dumps(data, indent=1, allow_nan=False)


def figure(comparison: Comparison | None, ours: bool) -> str:
    """An error as text, or nothing where there is none."""
    return "" if comparison is None else f"{comparison.error if ours else comparison.torch_error:.1e}"
