"""What a run found, as data: one row a provider and job, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..measuring.machine import Machine, Peaks

OK, UNAVAILABLE, WRONG, FAILED, LEFT_OUT = "ok", "unavailable", "wrong", "failed", "left out"
MODEL, LAYER = "model", "layer"
LOSES, EVEN, WINS = "loses", "even", "wins"


@dataclass(frozen=True)
class BenchRow:
    """One provider on one job.

    kind: of the subject, "model" or "layer"; count: how often its network has a layer. mode: as job.py has it. status:
    "ok", "unavailable", "wrong" (the gate), "failed" (it raised), "left out" (there was no time for it); `reason` says
    why. Times are seconds of one step: median, and what 20 and 80 % of the samples stay below. alone: they are not of
    rounds in which all take turns, which the run did not reach, but of this provider by itself, right after its first
    result. first: seconds from the provider's setup to its first result, with nothing compiled on disk; a provider may
    find what another before it compiled in the process. Ours compile ahead what they will launch, by several processes
    at once, as cnnfast.warm does for its users: that is counted. None of layers, whose kernels are compiled ahead for
    all of them. flops: of the model, whoever saves some. bytes: the least at the level that the provider fuses to.
    ceilings: least seconds at every level. kernels, peak_bytes (from setup to the first result, weights included) and
    saved_bytes (kept for backward) are None where unknown. error: the largest relative one against float64.
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
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None

    @property
    def job(self) -> tuple[str, str, str, int, str, str]:
        """What rows that may be compared have in common."""
        return self.kind, self.subject, self.mode, self.batch, self.input, self.dtype

    @property
    def images_per_second(self) -> float | None:
        return self.batch / self.median if self.median else None

    @property
    def tflops(self) -> float | None:
        """10^12 FLOPs a second."""
        return self.flops / self.median / 1e12 if self.median and self.flops else None

    @property
    def gbps(self) -> float | None:
        """10^9 of the least bytes a second."""
        return self.bytes / self.median / 1e9 if self.median and self.bytes else None

    @property
    def fractions(self) -> dict[str, float]:
        """Of every level's ceiling, what is reached: 1 is as fast as the machine allows."""
        return {level: seconds / self.median for level, seconds in self.ceilings.items()} if self.median else {}

    @property
    def fraction(self) -> float | None:
        """Of its own level's."""
        return self.fractions.get(self.level)


def jobs(rows: Iterable[BenchRow]) -> Iterator[list[BenchRow]]:
    """The rows of each job, in the order of the jobs."""
    found: dict[tuple, list[BenchRow]] = {}
    for row in rows:
        found.setdefault(row.job, []).append(row)
    yield from found.values()


def strongest(rows: Iterable[BenchRow]) -> BenchRow | None:
    """The fastest baseline, with right numbers."""
    return min((row for row in rows if row.baseline and row.median), key=lambda row: row.median or 0, default=None)


def our_best(rows: Iterable[BenchRow]) -> BenchRow | None:
    return min((row for row in rows if row.ours and row.median), key=lambda row: row.median or 0, default=None)


def speedup(rows: Sequence[BenchRow]) -> float | None:
    """How many times as fast as the strongest baseline our best is; below 1 it loses."""
    theirs, ours = strongest(rows), our_best(rows)
    return theirs.median / ours.median if theirs and ours and theirs.median and ours.median else None


def verdict(rows: Sequence[BenchRow]) -> str:
    """Whether our best loses, wins, or is even: the spreads from 20 to 80 % meet, or there is nothing to compare."""
    theirs, ours = strongest(rows), our_best(rows)
    if theirs and ours and (ours.low or 0) > (theirs.high or 0):
        return LOSES
    return WINS if theirs and ours and (ours.high or 0) < (theirs.low or 0) else EVEN


def lines(rows: Iterable[BenchRow]) -> list[str]:
    """JSON, a line for each: complete with machine and conditions, and derived figures."""
    texts = []
    for row in rows:
        data = {**vars(row), "machine": vars(row.machine), "peaks": vars(row.peaks)}
        figures = {
            name: getattr(row, name) for name in ("images_per_second", "tflops", "gbps", "fraction", "fractions")
        }
        texts.append(json.dumps(data | figures, allow_nan=False))
    return texts


def to_json(texts: Iterable[str]) -> str:
    """A list of what `lines` returns."""
    return "[\n " + ",\n ".join(texts) + "\n]"


def read(file: Path) -> list[BenchRow]:
    """What `to_json` made of rows. Raises ValueError, naming the file, if it holds anything else."""
    try:
        return [_row(data) for data in json.loads(file.read_text())]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no rows of `cnnfast bench --json`: {type(error).__name__}: {error}") from None


def _row(data: dict) -> BenchRow:
    names = BenchRow.__dataclass_fields__.keys()
    known = {name: value for name, value in data.items() if name in names}
    return BenchRow(**{**known, "machine": Machine(**data["machine"]), "peaks": Peaks(**data["peaks"])})
