"""What check found, as data, as a table and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

OK, FAIL, NOT_OURS, NOT_JUDGED = "ok", "FAIL", "not ours", "not judged"
STYLES = {OK: "green", FAIL: "bold red", NOT_OURS: "yellow", NOT_JUDGED: "yellow"}
# Lines of the child process begin so; kernels and libraries may print others.
ROW_MARK = "cnnfast-row "  # a row follows
NOTE_MARK = "cnnfast-note "  # what the child is doing
PROBLEMS = 10  # problems of one row that are shown
WIDTH = 100  # of str(report)


@dataclass
class Comparison:
    """One tensor of a call: our errors and PyTorch's against float64, the largest and the root mean square, and the
    limits.

    `message` says what is wrong other than an error too large: shape, dtype, NaN. `position` is that of the largest
    error. `largest` is the largest magnitude in the reference: errors are absolute, and this is the scale they belong
    to.
    """

    tensor: str
    error: float = 0.0
    torch_error: float = 0.0
    limit: float = 0.0
    rms: float = 0.0
    torch_rms: float = 0.0
    rms_limit: float = 0.0
    position: tuple[int, ...] = ()
    message: str = ""
    largest: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.message and self.error <= self.limit and self.rms <= self.rms_limit

    @property
    def backward(self) -> bool:
        return self.tensor.startswith("grad")

    @property
    def excess(self) -> float:
        """Error over limit: above 1 is a failure."""
        if self.message:
            return float("inf")
        return max(
            e / limit if limit else float(e > 0) for e, limit in ((self.error, self.limit), (self.rms, self.rms_limit))
        )

    def __str__(self) -> str:
        at = f" at {self.position}" if self.position else ""
        if self.message:
            return f"{self.tensor}: {self.message}{at}"
        if self.error > self.limit:
            return f"{self.tensor}: error {self.error:.2e} > {self.limit:.2e}{at}, PyTorch's own {self.torch_error:.2e}"
        limit = f"limit {self.rms_limit:.2e}, PyTorch's own {self.torch_rms:.2e}"
        return f"{self.tensor}: root mean square of the error {self.rms:.2e}, {limit}"


@dataclass
class CheckRow:
    """One call, or one step of a whole model: `forward` and `backward` name the kernels that were launched.

    `verdict` is "ok", "FAIL", "not ours", or, for steps alone, "not judged"; `reason` says why it is not "ok".
    """

    layer: str
    operation: str
    shapes: str
    dtype: str
    verdict: str = FAIL
    reason: str = ""
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CheckRow:
        comparisons = [Comparison(**{**c, "position": tuple(c["position"])}) for c in data["comparisons"]]
        return cls(**{**data, "comparisons": comparisons})

    @property
    def problems(self) -> list[str]:
        return [*filter(None, [self.reason]), *(str(c) for c in self.comparisons if not c.ok)]

    def worst(self, backward: bool) -> Comparison | None:
        """The comparison nearest to its limit, or furthest beyond it."""
        return max((c for c in self.comparisons if c.backward == backward), key=lambda c: c.excess, default=None)

    def __str__(self) -> str:
        return " ".join(filter(None, [self.layer, self.operation, self.shapes, self.dtype]))


@dataclass
class CheckReport:
    """The rows of a check: `rows` are the calls in their order, `whole` the steps of the model that conversion made of
    a module.

    str() is a table; rich prints it at the width of its console.
    """

    rows: list[CheckRow]
    whole: list[CheckRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there was a covered call, every call launched our kernels and holds, and so does every step of the
        whole model that could be judged.
        """
        return (
            bool(self.rows)
            and all(row.verdict == OK for row in self.rows)
            and all(row.verdict in (OK, NOT_JUDGED) for row in self.whole)
        )

    @property
    def summary(self) -> str:
        if not self.rows:
            return "FAIL: no covered call (convolution, batch norm, pooling) was made, so nothing was checked"
        text = f"{'ok' if self.ok else 'FAIL'}: of {len(self.rows)} calls {_counts(self.rows)}"
        return f"{text}; of {len(self.whole)} steps of the whole model {_counts(self.whole)}" if self.whole else text

    def to_json(self) -> str:
        """An object with ok, summary, rows and whole; errors are absolute, verdicts as in the table."""
        rows, whole = (
            [{**asdict(row), "comparisons": [{**asdict(c), "ok": c.ok} for c in row.comparisons]} for row in rows]
            for rows in (self.rows, self.whole)
        )
        return json.dumps(
            {"ok": self.ok, "summary": self.summary, "rows": rows, "whole": whole}, indent=1, allow_nan=False
        )

    def __rich__(self) -> Group:
        parts: list[Table | Text] = []
        if self.rows:
            title = "largest errors against float64; each column's tensor is the one nearest to its limit"
            parts += [_table(self.rows, "call", title), *_problems(self.rows)]
        if self.whole:
            parts += [
                _table(self.whole, "whole model", "the same of the whole model that cnnfast.convert makes"),
                *_problems(self.whole),
            ]
        return Group(*parts, Text(self.summary, STYLES[OK if self.ok else FAIL]))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()


def _counts(rows: list[CheckRow]) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in STYLES}
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)


def _table(rows: list[CheckRow], heading: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in (heading, "forward", "PyTorch", "backward", "PyTorch", ""):
        table.add_column(name, overflow="fold", ratio=1 if name == heading else None)
    for row in rows:
        cells = []
        for worst in (row.worst(False), row.worst(True)):
            cells += [f"{worst.error:.1e}", f"{worst.torch_error:.1e}"] if worst and worst.limit else ["", ""]
        table.add_row(Text(str(row)), *cells, Text(row.verdict, STYLES[row.verdict]))
    return table


def _problems(rows: list[CheckRow]) -> list[Text]:
    lines = []
    for row in rows:
        if row.verdict != OK:
            shown = row.problems[:PROBLEMS]
            more = [f"and {len(row.problems) - PROBLEMS} more"] if row.problems[PROBLEMS:] else []
            lines.append(Text(f"{row.verdict}: {row}\n    " + "\n    ".join([*shown, *more])))
    return lines
