"""Two runs side by side: what became slower, faster, wrong or unavailable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .report import milliseconds, title
from .rows import AUGMENTATION, LEFT_OUT, OK, BenchRow

NOISE = 0.05  # two medians that differ by less are the same
SLOWER, FASTER, BROKEN, SAME, MENDED = "slower", "faster", "BROKEN", "same", "works now"
STYLES = {BROKEN: "bold red", SLOWER: "red", FASTER: "green", MENDED: "green", SAME: ""}
ORDER = list(STYLES)


@dataclass(frozen=True)
class Change:
    """One provider on one job, in both runs. ratio: the time after by the time before, None if one is missing."""

    before: BenchRow
    after: BenchRow

    @property
    def ratio(self) -> float | None:
        return self.after.median / self.before.median if self.after.median and self.before.median else None

    @property
    def verdict(self) -> str:
        """Slower or faster if the medians differ by more than NOISE, and the spreads from 20 to 80 % do not overlap."""
        if self.ratio is None:
            return SAME if self.before.status == self.after.status else MENDED if self.after.status == OK else BROKEN
        if self.ratio > 1 + NOISE and (self.after.low or 0) > (self.before.high or 0):
            return SLOWER
        return FASTER if self.ratio < 1 / (1 + NOISE) and (self.after.high or 0) < (self.before.low or 0) else SAME

    def to_dict(self) -> dict[str, object]:
        """What the table shows, with the medians in seconds."""
        row = self.after
        job = {name: getattr(row, name) for name in ("kind", "subject", "mode", "dtype", "batch", "input", "provider")}
        times = {"before": self.before.median, "after": row.median, "ratio": self.ratio}
        return {**job, **times, "verdict": self.verdict, "reason": row.reason}


def compare(before: Sequence[BenchRow], after: Sequence[BenchRow]) -> list[Change]:
    """A change for each provider and job that both runs have, and that at least one of them has timed; the worst first.

    A row that one of the runs left out or timed alone, because it ended early, says nothing and is not compared.
    """
    known = {(row.job, row.provider): row for row in before if comparable(row)}
    changes = [
        Change(known[row.job, row.provider], row)
        for row in after
        if comparable(row) and (row.job, row.provider) in known
    ]
    changes = [change for change in changes if change.before.median or change.after.median]
    return sorted(changes, key=lambda change: (ORDER.index(change.verdict), -(change.ratio or 0)))


def comparable(row: BenchRow) -> bool:
    """Whether a row is of the rounds in which all providers take turns, or says why there is no time."""
    return row.status != LEFT_OUT and not row.alone


def regressed(changes: Sequence[Change]) -> list[Change]:
    """Those that are slower or broken."""
    return [change for change in changes if change.verdict in (SLOWER, BROKEN)]


def comparison(changes: Sequence[Change]) -> Group:
    """A table of the changes, and what differs between the machines of the two runs."""
    table = Table("provider", "job", "before ms", "after ms", "time", "", title="after / before", title_justify="left")
    for change in changes:
        row, verdict = change.after, change.verdict
        job = f"{row.subject}, {row.mode}, batch {row.batch}, {row.dtype}"
        if row.kind == AUGMENTATION:  # images of two layouts differ in nothing else
            job = title(row)
        note = Text(verdict if not row.reason or verdict == SAME else f"{verdict}: {row.reason}", STYLES[verdict])
        ratio = f"{change.ratio:.2f}x" if change.ratio else ""
        table.add_row(row.provider, job, milliseconds(change.before), milliseconds(row), ratio, note)
    notes = []
    if changes:
        one, other = changes[0].before.machine, changes[0].after.machine
        names = [
            name
            for name in ("device", "driver", "torch", "triton", "cudnn", "commit")
            if getattr(one, name) != getattr(other, name)
        ]
        notes = [
            Text(f"{name}: {getattr(one, name) or 'none'} before, {getattr(other, name) or 'none'} after")
            for name in names
        ]
    count = len(regressed(changes))
    summary = Text(f"{len(changes)} compared, {count} slower or broken", "bold red" if count else "green")
    return Group(table, *notes, summary)
