"""What a report says: a row for each module, totals and notes; as a table, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

FUSED, REPLACED, LEFT = "fused", "replaced", "left"
STYLES = {FUSED: "green", REPLACED: "green", LEFT: "yellow"}
WIDTH = 100  # of str(report)


HEADINGS = ("module", "class", "", "FLOPs", "bytes, computed", "into, or why")
COMPUTED = (
    "FLOPs and bytes are those of the forward pass. Bytes are computed from shapes and dtypes, not measured: what each"
    " call reads and returns, a fused step once."
)


@dataclass
class ConvolutionRow:
    """One module.

    status: "fused" (each call of it is part of a fused step, and `reason` says of which), "replaced" (its forward is
    ours, and `reason` says why it is not fused though that was planned, or that no call of it was seen), or "left"
    (`reason` says why). flops: multiplications and additions of its forward. bytes: what its calls read and return,
    computed from shapes and dtypes, not measured; those of a fused step are its first member's. Both are None where the
    model could not be run to find the sizes.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    flops: int | None = None
    convolution: bool = False
    bytes: int | None = None


@dataclass
class CollectedRow:
    """What is no module that cnnfast covers or could cover, collected by class: modules (`names` has them, `count`
    their number), or operations that forwards call between modules (`names` has these, `count` the number of calls).

    status: "left": it stays PyTorch's, and `reason` says why, and what can be done. "replaced": functions of
    cnnfast.functional that a forward calls. flops, bytes: of all of them together, as a ConvolutionRow has them.
    """

    kind: str
    count: int
    names: list[str]
    status: str
    reason: str
    flops: int | None
    bytes: int | None


@dataclass
class ConversionReport:
    """What of a model is ours, and what is not. str() is a table; rich prints it at the width of its console.

    rows: the modules that cnnfast covers, or could cover. collected: everything else that costs something. total_flops,
    total_bytes: of one forward pass of the whole model, which is the sum of all rows; None if unknown. Bytes are
    computed from shapes and dtypes, not measured: see ConvolutionRow. saved_bytes: how many more they would be if
    nothing were fused; None if unknown. input: of which input sizes that is. notes: what else a user should know.
    """

    rows: list[ConvolutionRow]
    collected: list[CollectedRow]
    total_flops: int | None
    total_bytes: int | None
    saved_bytes: int | None
    input: str
    notes: list[str]

    def count(self, status: str) -> int:
        """How many convolutions have that status: "fused", "replaced" or "left"."""
        return sum(row.convolution and row.status == status for row in self.rows)

    @property
    def coverage(self) -> float | None:
        """The share of the model's FLOPs that our code serves (modules with our forward, and fused steps), from 0 to 1;
        None if unknown, or if there are none.
        """
        if not self.total_flops:
            return None
        return sum(row.flops or 0 for row in self._all() if row.status != LEFT) / self.total_flops

    @property
    def coverage_bytes(self) -> float | None:
        """The same share of the bytes that the model moves as it is now."""
        if not self.total_bytes:
            return None
        return sum(row.bytes or 0 for row in self._all() if row.status != LEFT) / self.total_bytes

    def _all(self) -> list[ConvolutionRow | CollectedRow]:
        return [*self.rows, *self.collected]

    @property
    def summary(self) -> str:
        total = sum(row.convolution for row in self.rows)
        fused, replaced, left = map(self.count, (FUSED, REPLACED, LEFT))
        text = f"{fused} of {total} convolutions fused, {replaced} replaced, {left} left"
        shares = [(self.coverage, "FLOPs"), (self.coverage_bytes, "bytes")]
        told = [f"{share:.1%} of the {what}" for share, what in shares if share is not None]
        return f"{text}; {' and '.join(told)} served ({self.input})" if told else text

    def to_json(self) -> str:
        """An object with summary, coverage, coverage_bytes, total_flops, total_bytes, saved_bytes, input, notes, rows
        and collected.
        """
        head = ("summary", "coverage", "coverage_bytes", "total_flops", "total_bytes", "saved_bytes", "input", "notes")
        rows = {"rows": list(map(asdict, self.rows)), "collected": list(map(asdict, self.collected))}
        return json.dumps({name: getattr(self, name) for name in head} | rows, indent=1)

    def __rich__(self) -> RenderableType:
        table = Table(title=COMPUTED if self.total_bytes else None, title_justify="left", title_style="")
        for heading in HEADINGS:
            numbers = heading in ("FLOPs", "bytes, computed")
            table.add_column(heading, overflow="fold", justify="right" if numbers else "left")
        for name, kind, row, flops, moved in self._lines():
            shares = [
                f"{part / whole:.1%}" if part and whole else ""
                for part, whole in ((flops, self.total_flops), (moved, self.total_bytes))
            ]
            table.add_row(Text(name), Text(kind), Text(row.status, STYLES[row.status]), *shares, Text(row.reason))
        notes = list(self.notes)
        if self.saved_bytes and self.total_bytes:
            notes.append(
                f"Fused steps save {self.saved_bytes / (self.total_bytes + self.saved_bytes):.1%} of the bytes."
            )
        return Group(table, *(Text(note, "yellow") for note in notes), Text(self.summary, "bold"))

    def _lines(self) -> Iterator[tuple[str, str, ConvolutionRow | CollectedRow, int, int]]:
        """(module, class, the first of its rows, FLOPs, bytes) for each line of the table: those that are left for one
        reason are one line.
        """
        lines: dict[tuple[str, ...], list[ConvolutionRow]] = {}
        for row in self.rows:
            lines.setdefault((row.kind, row.reason) if row.status == LEFT else (row.name, ""), []).append(row)
        for rows in lines.values():
            costs = sum(row.flops or 0 for row in rows), sum(row.bytes or 0 for row in rows)
            yield *_named([row.name for row in rows], rows[0].kind), rows[0], *costs
        for row in self.collected:
            names = row.names if row.count == len(row.names) else [""]
            yield *_named(names, row.kind), row, row.flops or 0, row.bytes or 0

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()


def _named(names: list[str], kind: str) -> tuple[str, str]:
    """A line's module and class, with a count if it is of more than one."""
    more = len(names) - 1
    return (f"{names[0]} and {more} more", f"{kind} x {more + 1}") if more else (names[0], kind)
