"""What was measured by tuning: as data, as a table and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cnnfast_kernels.tables import Key, TableRow

from ..dtypes import TF32
from ..precision import Products
from .capture import Convolution

DEFAULT, LIBRARY = "default", "library"  # the names of these two candidates; other tiles are named as they print
WIDTH = 120  # of str(tuning)


@dataclass
class Candidate:
    """One way to compute a convolution: by our kernels with a tile, or by the library, where `tile` is None.

    computes: whether its numbers were right. microseconds: the median, or None if it was not timed. fault: what is
    wrong with its numbers. failure: why it does not run here, or could not be timed.
    """

    tile: Any
    computes: bool = False
    microseconds: float | None = None
    fault: str = ""
    failure: str = ""


@dataclass
class Measured:
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
        stride = f"/{g.stride_h}" if g.stride_h == g.stride_w else f"/{g.stride_h}x{g.stride_w}"
        dilated = f" dilated {g.dil_h}x{g.dil_w}" if (g.dil_h, g.dil_w) != (1, 1) else ""
        groups = f" groups {g.groups}" if g.groups > 1 else ""
        doing = f" + {self.key.epilogue}" if self.key.epilogue else ""
        return f"{self.key.operation}{doing} {g.N}x{g.C}x{g.H}x{g.W} > {g.K}, {g.R}x{g.S}{stride}{dilated}{groups}"

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
        timed = [c for c in self.candidates.values() if c.tile is not None and c.microseconds is not None]
        return min(timed, key=lambda c: c.microseconds or 0.0, default=None)

    @property
    def rival(self) -> Candidate | None:
        """The library, if it computes right numbers and could not be timed: then it is not known who is faster."""
        library = self.candidates.get(LIBRARY)
        return library if library is not None and library.computes and library.microseconds is None else None

    @property
    def row(self) -> TableRow | None:
        """The row for the table. None if no candidate of ours was right and timed, or if the library was right and not
        timed.
        """
        if self.best is None or self.best.microseconds is None or self.rival is not None:
            return None
        named = {
            "kernels": self.best.microseconds,
            "default": self.microseconds(DEFAULT),
            "library": self.microseconds(LIBRARY),
        }
        times = {name: round(time, 2) for name, time in named.items() if time is not None}
        winner = "library" if times.get("library", times["kernels"]) < times["kernels"] else "kernels"
        return TableRow(self.key, self.best.tile, winner, times)

    @property
    def faults(self) -> list[str]:
        return [f"{name}: {c.fault}" for name, c in self.candidates.items() if c.fault]

    @property
    def problems(self) -> list[str]:
        """A line for each candidate with wrong numbers, and one if the convolution has no row."""
        lines = self.faults
        if self.row is None:
            failures = [
                f"{name}: {c.failure}" for name, c in self.candidates.items() if c.failure and c is not self.rival
            ]
            reasons = [self.reason, f"{LIBRARY}: {self.rival.failure}" if self.rival else "", *failures]
            lines.append("not measured: " + next(filter(None, reasons), "no candidate was right"))
        return lines


@dataclass
class Tuning:
    """What was measured on a GPU, and the tables that it was written to. str() is a table; rich prints it at the width
    of its console.

    left: what was not measured, because the budget or the run ended before. path: the user's table. table: the other
    table that was asked for. Both are None until there is a row. seconds: of all measuring. notes: what else a reader
    should know of the run.
    """

    gpu: str
    arch: int
    measured: list[Measured] = field(default_factory=list)
    left: list[Measured] = field(default_factory=list)
    path: Path | None = None
    table: Path | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[TableRow]:
        return [row for m in self.measured if (row := m.row) is not None]

    @property
    def problems(self) -> list[tuple[Measured, str]]:
        """Wrong numbers, and what could not be measured. What is left is no problem, unless its numbers were wrong
        before time ran out.
        """
        return [(m, line) for m in self.measured for line in m.problems] + [
            (m, line) for m in self.left for line in m.faults
        ]

    @property
    def ok(self) -> bool:
        """Whether no candidate computed wrong numbers, and all that was tried could be measured; see also `left`."""
        return not self.problems

    @property
    def summary(self) -> str:
        won = sum(row.winner == "library" for row in self.rows)
        both = [
            (m.count, row.microseconds)
            for m in self.measured
            if (row := m.row) is not None and "default" in row.microseconds
        ]
        default = sum(count * times["default"] for count, times in both) / 1000
        best = (
            sum(count * min(times["kernels"], times.get("library", times["kernels"])) for count, times in both) / 1000
        )
        return (
            f"{len(self.rows)} of {len(self.measured) + len(self.left)} convolutions measured in {self.seconds:.0f}"
            f" seconds: our kernels win {len(self.rows) - won}, the library {won}; one after the other they take"
            f" {default:.3f} ms by default, {best:.3f} ms by this table"
        )

    def to_json(self) -> str:
        """An object with gpu, arch, ok, summary, seconds, table (the path of the user's), other_table (the path of the
        one that was asked for), notes, measured (each convolution with its candidates), and left.
        """
        measured = [
            {
                "convolution": str(m),
                "operator": m.convolution.operator,
                "count": m.count,
                "row": row.to_dict() if (row := m.row) else None,
                "problems": m.problems,
                "candidates": [
                    {
                        "name": name,
                        "tile": None if c.tile is None else str(c.tile),
                        "microseconds": c.microseconds,
                        "fault": c.fault,
                        "failure": c.failure,
                    }
                    for name, c in m.candidates.items()
                ],
            }
            for m in self.measured
        ]
        head = {
            "gpu": self.gpu,
            "arch": self.arch,
            "ok": self.ok,
            "summary": self.summary,
            "seconds": round(self.seconds, 1),
            "table": str(self.path) if self.path else None,
            "other_table": str(self.table) if self.table else None,
            "notes": self.notes,
        }
        left = [
            {"convolution": str(m), "dtype": m.key.dtype, "count": m.count, "problems": m.faults} for m in self.left
        ]
        return json.dumps({**head, "measured": measured, "left": left}, indent=1, allow_nan=False)

    def __rich__(self) -> Group:
        table = Table(title=f"microseconds on {self.gpu}, medians")
        for heading in ("calls", "convolution", "default", "our best", "library", "serves"):
            table.add_column(
                heading, justify="left" if heading in ("convolution", "serves") else "right", overflow="fold"
            )
        for m in self.measured:
            if (row := m.row) is not None:
                times = [
                    f"{row.microseconds[name]:.1f}" if name in row.microseconds else ""
                    for name in ("default", "kernels", "library")
                ]
                serves = Text("library", "yellow") if row.winner == "library" else Text(str(row.tile), "green")
                table.add_row(str(m.count), str(m), *times, serves)
        wrong = [Text(f"{m}: {line}", "bold red") for m, line in self.problems]
        left = (
            [Text(f"left unmeasured, their rows as they were: {len(self.left)} convolutions", "yellow")]
            if self.left
            else []
        )
        left += [Text(f"  {m}, {m.key.dtype}, calls: {m.count}", "yellow") for m in self.left]
        end = [*self.notes, self.summary, f"table: {self.path or 'not written, for there is nothing to say'}"]
        end += [f"also written to {self.table}"] if self.table else []
        return Group(*wrong, table, *left, Text("\n".join(end)))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()
