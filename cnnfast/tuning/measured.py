"""What is measured by tuning: a convolution, or a residual block in training, and its candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.questions import BlockQuestion
from cnnfast_kernels.tables import AnyRow, BlockKey, BlockRow, Key, TableRow

from ..dtypes import TF32
from ..precision import Products
from .capture import Convolution

K = TypeVar("K", Key, BlockKey)

# The names of candidates; other tiles are named as they print. A block has the last two.
DEFAULT, KERNELS, LIBRARY = "default", "kernels", "library"


@dataclass
class Candidate:
    """One way to compute a convolution: by our kernels with a tile, or by the library, where `tile` is None; or a
    block, whose convolutions have tiles of their own.

    computes: whether its numbers were right. microseconds: the median, or None if it was not timed. fault: what is
    wrong with its numbers. failure: why it does not run here, or could not be timed.
    """

    tile: Any
    computes: bool = False
    microseconds: float | None = None
    fault: str = ""
    failure: str = ""


class Contest(Generic[K]):
    """What the candidates of a convolution and those of a block have in common."""

    key: K
    candidates: dict[str, Candidate]
    reason: str

    @property
    def products(self) -> Products:
        """How float32 operands are multiplied."""
        return "tf32" if self.key.dtype == TF32 else "ieee"

    def forget(self) -> None:
        """Drops what was measured before time ran out, but for faults: numbers that were wrong stay known."""
        self.reason = ""
        for candidate in self.candidates.values():
            candidate.computes, candidate.microseconds, candidate.failure = False, None, ""

    def microseconds(self, name: str) -> float | None:
        candidate = self.candidates.get(name)
        return candidate.microseconds if candidate else None

    @property
    def best(self) -> Candidate | None:
        """The fastest candidate of ours."""
        timed = [c for name, c in self.candidates.items() if name != LIBRARY and c.microseconds is not None]
        return min(timed, key=lambda c: c.microseconds or 0.0, default=None)

    @property
    def rival(self) -> Candidate | None:
        """The library, if it computes right numbers and could not be timed: then it is not known who is faster."""
        library = self.candidates.get(LIBRARY)
        return library if library is not None and library.computes and library.microseconds is None else None

    @property
    def row(self) -> AnyRow | None:
        """The row for the table. None if no candidate of ours was right and timed, or if the library was right and not
        timed.
        """
        best = self.best
        if best is None or best.microseconds is None or self.rival is not None:
            return None
        named = {
            "kernels": best.microseconds,
            "default": self.microseconds(DEFAULT),
            "library": self.microseconds(LIBRARY),
        }
        times = {name: round(time, 2) for name, time in named.items() if time is not None}
        library = times.get("library", times["kernels"]) < times["kernels"]
        if isinstance(self.key, BlockKey):
            return BlockRow(self.key, "library" if library else "kernels", times)
        return TableRow(self.key, best.tile, "library" if library else "kernels", times)

    @property
    def faults(self) -> list[str]:
        return [f"{name}: {c.fault}" for name, c in self.candidates.items() if c.fault]

    @property
    def problems(self) -> list[str]:
        """A line for each candidate with wrong numbers, and one if there is no row."""
        lines = self.faults
        if self.row is None:
            failures = [
                f"{name}: {c.failure}" for name, c in self.candidates.items() if c.failure and c is not self.rival
            ]
            reasons = [self.reason, f"{LIBRARY}: {self.rival.failure}" if self.rival else "", *failures]
            lines.append("not measured: " + next(filter(None, reasons), "no candidate was right"))
        return lines


@dataclass
class Measured(Contest[Key]):
    """One convolution, and its candidates by name.

    count: how often the model makes it. cost: seconds of all its calls, by an estimate that only puts convolutions into
    an order (planning.py). reason: why nothing was measured, or the empty string.
    """

    key: Key
    convolution: Convolution
    count: int = 0
    cost: float = 0.0
    candidates: dict[str, Candidate] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        g = self.key.problem
        doing = f" + {self.key.epilogue}" if self.key.epilogue else ""
        return f"{self.key.operation}{doing} {_image(g)} > {_filters(g)}"


@dataclass
class MeasuredBlock(Contest[BlockKey]):
    """One residual block in training, forward and backward, and its two candidates: our kernels with the tiles of its
    convolutions' rows, and the library. Fields as Measured has them.
    """

    key: BlockKey
    block: BlockQuestion
    count: int = 0
    cost: float = 0.0
    candidates: dict[str, Candidate] = field(
        default_factory=lambda: {KERNELS: Candidate(None), LIBRARY: Candidate(None)}
    )
    reason: str = ""

    def __str__(self) -> str:
        branch = " > ".join(map(_filters, self.key.branch))
        shortcut = f" + {_filters(self.key.problems[-1])}" if self.key.projection else ""
        return f"block {_image(self.key.problems[0])} > {branch}{shortcut}"


def _image(g: ConvProblem) -> str:
    return f"{g.N}x{g.C}x{g.H}x{g.W}"


def _filters(g: ConvProblem) -> str:
    stride = f"/{g.stride_h}" if g.stride_h == g.stride_w else f"/{g.stride_h}x{g.stride_w}"
    dilated = f" dilated {g.dil_h}x{g.dil_w}" if (g.dil_h, g.dil_w) != (1, 1) else ""
    groups = f" groups {g.groups}" if g.groups > 1 else ""
    return f"{g.K}, {g.R}x{g.S}{stride}{dilated}{groups}"
