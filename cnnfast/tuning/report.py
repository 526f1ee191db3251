"""What was measured by tuning: as data, as a table and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cnnfast_kernels.tables import AnyRow, BlockRow, TableRow

from .measured import Measured, MeasuredBlock

WIDTH = 120  # of str(tuning)


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
    measured: list[Measured | MeasuredBlock] = field(default_factory=list)
    left: list[Measured | MeasuredBlock] = field(default_factory=list)
    path: Path | None = None
    table: Path | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[AnyRow]:
        return [row for m in self.measured if (row := m.row) is not None]

    @property
    def problems(self) -> list[tuple[Measured | MeasuredBlock, str]]:
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
        both = [
            (m.count, row.microseconds)
            for m in self.measured
            if (row := m.row) is not None and "default" in row.microseconds
        ]
        default = sum(count * times["default"] for count, times in both) / 1000
        best = (
            sum(count * min(times["kernels"], times.get("library", times["kernels"])) for count, times in both) / 1000
        )
        text = (
            f"{self._won(Measured)} convolutions measured in {self.seconds:.0f} seconds: {self._winners(TableRow)}; one"
            f" after the other they take {default:.3f} ms by default, {best:.3f} ms by this table"
        )
        if any(isinstance(m, MeasuredBlock) for m in (*self.measured, *self.left)):
            text += f"; {self._won(MeasuredBlock)} residual blocks measured: {self._winners(BlockRow)}"
        return text

    def _won(self, kind: type) -> str:
        """How many of a kind have a row, of how many."""
        rows = sum(isinstance(m, kind) and m.row is not None for m in self.measured)
        return f"{rows} of {sum(isinstance(m, kind) for m in (*self.measured, *self.left))}"

    def _winners(self, kind: type) -> str:
        winners = [row.winner for row in self.rows if isinstance(row, kind)]
        return f"our kernels win {winners.count('kernels')}, the library {winners.count('library')}"

    def to_json(self) -> str:
        """An object with gpu, arch, ok, summary, seconds, table (the path of the user's), other_table (the path of the
        one that was asked for), notes, measured (each convolution, and each block, with its candidates), and left.
        """
        measured = [
            {
                **named(m),
                **({"operator": m.convolution.operator} if isinstance(m, Measured) else {}),
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
        left = [{**named(m), "dtype": m.key.dtype, "count": m.count, "problems": m.faults} for m in self.left]
        return json.dumps({**head, "measured": measured, "left": left}, indent=1, allow_nan=False)

    def __rich__(self) -> Group:
        table = Table(title=f"microseconds on {self.gpu}, medians")
        for heading in ("calls", "what", "default", "our best", "library", "serves"):
            table.add_column(heading, justify="left" if heading in ("what", "serves") else "right", overflow="fold")
        for m in self.measured:
            if (row := m.row) is not None:
                times = [
                    f"{row.microseconds[name]:.1f}" if name in row.microseconds else ""
                    for name in ("default", "kernels", "library")
                ]
                ours = str(row.tile) if isinstance(row, TableRow) else "our kernels"
                serves = Text("library", "yellow") if row.winner == "library" else Text(ours, "green")
                table.add_row(str(m.count), str(m), *times, serves)
        wrong = [Text(f"{m}: {line}", "bold red") for m, line in self.problems]
        left = [Text(f"left unmeasured, their rows as they were: {counted(self.left)}", "yellow")] if self.left else []
        left += [Text(f"  {m}, {m.key.dtype}, calls: {m.count}", "yellow") for m in self.left]
        end = [*self.notes, self.summary, f"table: {self.path or 'not written, for there is nothing to say'}"]
        end += [f"also written to {self.table}"] if self.table else []
        return Group(*wrong, table, *left, Text("\n".join(end)))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()


def named(m: Measured | MeasuredBlock) -> dict[str, str]:
    """What JSON calls it."""
    return {"block" if isinstance(m, MeasuredBlock) else "convolution": str(m)}


def counted(measured: Sequence[Measured | MeasuredBlock]) -> str:
    """How many convolutions and how many blocks, in words."""
    blocks = sum(isinstance(m, MeasuredBlock) for m in measured)
    return f"{len(measured) - blocks} convolutions" + (f" and {blocks} residual blocks" if blocks else "")
