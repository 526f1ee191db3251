"""What reaches CUDA, of every kernel and tile, all dtypes, layouts and many geometries: by plans and by Triton, compared to the byte.

    python ci/recorded_launches.py                                 # on the triton that is installed: a quarter of an hour on one core
    python ci/recorded_launches.py --overlay FOLDER --overlay ...  # on those in these folders (pip install --target), one by one

No GPU is needed: Triton's real launcher runs over a driver that records (cnnfast_kernels/aot/recording_driver; what is launched is in
harness/launch_survey.py). Prints a table and writes it to ci/results/recorded_launches.txt; exit code 1 if anything is wrong.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "ci" / "results" / "recorded_launches.txt"
PARTS = 16  # processes, each of which takes every sixteenth case: so much is told on the way, and no more compiled twice
sys.path[:0] = [str(ROOT / folder) for folder in ("harness", "kernels", "")]

from child import run_compiled  # noqa: E402
from fuzz import commit  # noqa: E402
from launch_survey import Survey, revived  # noqa: E402


def survey_part(part, parts):  # runs in a process of its own, to which its source alone travels
    import launch_survey

    return launch_survey.plain(launch_survey.survey(False, part, parts))


def surveyed(overlay: str, jobs: int, console: Console) -> Survey:
    """All cases on the triton in `overlay`, or the installed one."""

    def take(part: int) -> Survey:
        found = revived(run_compiled(survey_part, part, PARTS, timeout=3600, overlay=overlay))
        console.print(f"triton {found.triton}, part {part + 1} of {PARTS}: {found.by_plan.total()} launches, {len(found.wrong)} wrong")
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return reduce(add, pool.map(take, range(PARTS)))


ROWS = {
    "launches by a plan, compared with Triton's own": lambda s: s.by_plan.total(),
    "of these, after one with all operands aligned, one is not": lambda s: s.unaligned.total(),
    "launches that have no plan": lambda s: s.by_triton.total(),
    "kernels": lambda s: len(s.kernels),
    "launches that differ": lambda s: len(s.differing),
    "cases that fail": lambda s: len(s.failed),
    "binaries": lambda s: len(s.binaries),
    "binaries that expect other parameter sizes than the launcher passes": lambda s: len(s.size_mismatches),
    "binaries that need scratch memory": lambda s: len(s.scratch),
    "tensor maps": lambda s: s.encodes,
    "of these, beyond CUDA's documented limits": lambda s: len(s.illegal),
    "of these, beyond their tensor's memory": lambda s: len(s.outside),
    "of these, with strides that do not ascend": lambda s: s.permuted,
    "of these, with positions that share an address": lambda s: s.overlapping,
}


def table_of(first: str, surveys: Sequence[Survey], rows: Sequence[tuple[str, Sequence[int]]]) -> Table:
    """A column of numbers for each version."""
    table = Table(box=None, show_edge=False)
    table.add_column(first)
    for s in surveys:
        table.add_column(f"triton {s.triton}", justify="right")
    for name, counts in rows:
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def report(surveys: Sequence[Survey], console: Console) -> None:
    wrong = sum(len(s.wrong) for s in surveys)
    machine = f"sm_90, torch {version('torch')}, Python {platform.python_version()}, commit {commit()}"
    console.print(f"\nci/recorded_launches.py: {wrong} wrong; {machine}\n", highlight=False)
    rows = [(name, [count(s) for s in surveys]) for name, count in ROWS.items()]
    console.print(table_of("", surveys, rows))
    for s in surveys:
        for line in s.wrong:
            console.print(f"\ntriton {s.triton}: {line}", highlight=False, markup=False)
    kernels = sorted(set().union(*(s.kernels for s in surveys)))
    console.print()
    console.print(table_of("launches of", surveys, [(k, [s.by_plan[k] + s.by_triton[k] for s in surveys]) for k in kernels]))


def main(
    overlay: Annotated[list[Path] | None, typer.Option(help="Folder with another triton; may be given several times.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes at once.")] = os.cpu_count() or 1,
    result: Annotated[Path, typer.Option(help="Where the table goes.")] = RESULT,
) -> None:
    """What reaches CUDA, by plans and by Triton, compared to the byte."""
    console = Console(width=140)
    surveys = [surveyed(str(folder), jobs, console) for folder in overlay or [""]]
    report(surveys, console)
    result.parent.mkdir(parents=True, exist_ok=True)
    with result.open("w") as file:
        report(surveys, Console(file=file, width=140))
    raise typer.Exit(any(s.wrong for s in surveys))


if __name__ == "__main__":
    typer.run(main)
