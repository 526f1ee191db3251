"""What a report says: a row for each module, totals and notes; as a table, and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

FUSED, REPLACED, LEFT = "fused", "replaced", "left"
STYLES = {FUSED: "green", REPLACED: "green", LEFT: "yellow"}
WIDTH = 100  # of str(report)


@dataclass
class ConvolutionRow:
    """One module.

    status: "fused" (each call of it is part of a fused step, and `reason` says of which), "replaced" (its forward is
    ours, and `reason` says why it is not fused though that was planned, or that no call of it was seen), or "left"
    (`reason` says why). flops: multiplications and additions of its forward; None where the model could not be run to
    find the sizes.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    flops: int | None = None
    convolution: bool = False


@dataclass
class ConversionReport:
    """The modules that cnnfast covers, or could cover. str() is a table; rich prints it at the width of its console.

    total_flops: of the whole model, None if unknown. input: of which input sizes the FLOPs are. notes: what else a user
    should know.
    """

    rows: list[ConvolutionRow]
    total_flops: int | None
    input: str
    notes: list[str]

    def count(self, status: str) -> int:
        """How many convolutions have that status: "fused", "replaced" or "left"."""
        return sum(row.convolution and row.status == status for row in self.rows)

    @property
    def coverage(self) -> float | None:
        """The share of the model's FLOPs that are in modules with our forward, from 0 to 1."""
        if not self.total_flops:
            return None
        return sum(row.flops or 0 for row in self.rows if row.status != LEFT) / self.total_flops

    @property
    def summary(self) -> str:
        total = sum(row.convolution for row in self.rows)
        fused, replaced, left = map(self.count, (FUSED, REPLACED, LEFT))
        text = f"{fused} of {total} convolutions fused, {replaced} replaced, {left} left"
        return text if self.coverage is None else f"{text}; {self.coverage:.1%} of the FLOPs ({self.input})"

    def to_json(self) -> str:
        """An object with summary, coverage, total_flops, input, notes and rows."""
        head = {
            "summary": self.summary,
            "coverage": self.coverage,
            "total_flops": self.total_flops,
            "input": self.input,
        }
        return json.dumps({**head, "notes": self.notes, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def __rich__(self) -> RenderableType:
        table = Table()
        for heading in ("module", "class", "", "FLOPs", "into, or why"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "FLOPs" else "left")
        for row in self.rows:
            flops = f"{row.flops / self.total_flops:.1%}" if row.flops and self.total_flops else ""
            table.add_row(Text(row.name), Text(row.kind), Text(row.status, STYLES[row.status]), flops, Text(row.reason))
        return Group(table, *(Text(note, "yellow") for note in self.notes), Text(self.summary, "bold"))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()
