"""What a run found, as data: one row for each provider and job, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..measuring.machine import Machine, Peaks

OK, UNAVAILABLE, WRONG, FAILED, LEFT_OUT = "ok", "unavailable", "wrong", "failed", "left out"
MODEL, LAYER, BLOCK, AUGMENTATION = "model", "layer", "block", "augmentation"
LOSES, EVEN, WINS = "loses", "even", "wins"


@dataclass(frozen=True)
class BenchRow:
    """One provider on one job.

    kind: of the subject, "model", "layer", "block" or "augmentation". count: how often its network has a layer or a
    block. mode: as job.py has it. status: "ok", "unavailable", "wrong" (by the gate), "failed" (it raised), or "left
    out" (there was no time for it); `reason` says why.

    median, low, high: seconds of one step, the median of all samples, and what 20 and 80 % of them stay below. alone:
    whether the samples are of this provider by itself, right after its first result, because the run did not reach the
    rounds in which all take turns.

    first: seconds from the provider's setup to its first result, with nothing compiled on disk; but it finds what
    providers before it have compiled in the process. Ours compile ahead what they will launch, by several processes at
    once, as cnnfast.warm does for its users, and that is counted. None for layers, whose kernels are compiled ahead for
    several layers together.

    flops: of the model, also if a provider needs fewer. bytes: the least at the level that the provider fuses to.
    ceilings: the least seconds at every level. kernels, peak_bytes (from setup to the first result, weights included)
    and saved_bytes (kept for the backward pass) are None where unknown. error: the largest relative one against
    float64.

    launches, moved_bytes: of an augmentation, how many kernels one step launches at the least, and how many bytes these
    read and write: of our kernels by replaying what they launch, of PyTorch's by counting its operators
    (counting.py). package: whose code augments, with its version. Other subjects have none of these.
    """

    kind: str
    subject: str
    provider: str
    baseline: bool
    ours: bool
    mode: str
    dtype: str
    layout: str
    batch: int
    input: str
    status: str
    machine: Machine
    peaks: Peaks
    count: int = 1
    reason: str = ""
    median: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    alone: bool = False
    first: float | None = None
    flops: int | None = None
    bytes: int | None = None
    level: str = ""
    ceilings: dict[str, float] = field(default_factory=dict)
    kernels: int | None = None
    launches: float | None = None
    moved_bytes: float | None = None
    package: str = ""
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None

    @property
    def job(self) -> tuple[str, str, str, int, str, str]:
        """What is the same in rows that may be compared."""
        return self.kind, self.subject, self.mode, self.batch, self.input, self.dtype

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.median if self.median else None

    @property
    def tflops(self) -> float | None:
        """FLOPs a second, in units of 10^12."""
        return self.flops / self.median / 1e12 if self.median and self.flops else None

    @property
    def gbps(self) -> float | None:
        """The least bytes, by the seconds that were taken, in units of 10^9."""
        return self.bytes / self.median / 1e9 if self.median and self.bytes else None

    @property
    def fractions(self) -> dict[str, float]:
        """How much of every level's ceiling is reached: 1 is as fast as the machine allows."""
        return {level: seconds / self.median for level, seconds in self.ceilings.items()} if self.median else {}

    @property
    def fraction(self) -> float | None:
        """How much of the ceiling of its own level is reached."""
        return self.fractions.get(self.level)


def jobs(rows: Iterable[BenchRow]) -> Iterator[list[BenchRow]]:
    """The rows of each job, in the order of the jobs."""
    found: dict[tuple, list[BenchRow]] = {}
    for row in rows:
        found.setdefault(row.job, []).append(row)
    yield from found.values()


def strongest(rows: Iterable[BenchRow]) -> BenchRow | None:
    """The fastest baseline; only one with right numbers has a time."""
    return min((row for row in rows if row.baseline and row.median), key=lambda row: row.median or 0, default=None)


def our_best(rows: Iterable[BenchRow]) -> BenchRow | None:
    """The fastest of cnnfast's."""
    return min((row for row in rows if row.ours and row.median), key=lambda row: row.median or 0, default=None)


def speedup(rows: Sequence[BenchRow]) -> float | None:
    """How many times as fast as the strongest baseline our best is; below 1 it loses. None if either is missing."""
    theirs, ours = strongest(rows), our_best(rows)
    return theirs.median / ours.median if theirs and ours and theirs.median and ours.median else None


def verdict(rows: Sequence[BenchRow]) -> str:
    """Whether our best loses, wins, or is even, which it is where the spreads from 20 to 80 % overlap, or where there
    is nothing to compare.
    """
    theirs, ours = strongest(rows), our_best(rows)
    if theirs and ours and (ours.low or 0) > (theirs.high or 0):
        return LOSES
    return WINS if theirs and ours and (ours.high or 0) < (theirs.low or 0) else EVEN


def lines(rows: Iterable[BenchRow]) -> list[str]:
    """Each row as one line of JSON, with the machine, the conditions, and the figures that follow from the times."""
    texts = []
    for row in rows:
        data = {**vars(row), "machine": vars(row.machine), "peaks": vars(row.peaks)}
        figures = {
            name: getattr(row, name) for name in ("images_per_second", "tflops", "gbps", "fraction", "fractions")
        }
        texts.append(json.dumps(data | figures, allow_nan=False))
    return texts


def to_json(texts: Iterable[str]) -> str:
    """The JSON list of these lines."""
    return "[\n " + ",\n ".join(texts) + "\n]"


def read(file: Path) -> list[BenchRow]:
    """The rows in a file that `to_json` made. Raises ValueError, naming the file, if it holds anything else."""
    try:
        return [_row(data) for data in json.loads(file.read_text())]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no rows of `cnnfast bench --json`: {type(error).__name__}: {error}") from None


def _row(data: dict) -> BenchRow:
    names = BenchRow.__dataclass_fields__.keys()
    known = {name: value for name, value in data.items() if name in names}
    return BenchRow(**{**known, "machine": Machine(**data["machine"]), "peaks": Peaks(**data["peaks"])})
