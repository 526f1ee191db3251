"""What reaches CUDA, of every kernel and tile, all dtypes, layouts and many geometries: by plans and by Triton,
compared to the byte.

    python ci/recorded_launches.py                                 # on the installed triton: 15 minutes on one core
    python ci/recorded_launches.py --overlay FOLDER --overlay ...  # on the tritons in these folders, one by one

A folder of --overlay is what pip install --target fills.

No GPU is needed: Triton's real launcher runs over a driver that records (cnnfast_kernels/aot/recording_driver; what is
launched is in tests/support/launch_survey.py). Prints a table and writes it to
ci/results/recorded_launches/triton-VERSION.txt, one file for each version, as soon as it is done; exit code 1 if
anything is wrong.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated

import typer
from checkout import RESULTS, versions
from rich.console import Console
from rich.table import Table

from tests.support.child import run_compiled
from tests.support.launch_survey import Survey, revived

# processes, each of which takes every sixteenth case: so much is told on the way, and no more compiled twice
PARTS = 16


def survey_part(part, parts):  # runs in a process of its own, to which its source alone travels
    from tests.support import launch_survey

    return launch_survey.plain(launch_survey.survey(False, part, parts))


def surveyed(overlay: str, jobs: int, console: Console) -> Survey:
    """All cases on the triton in `overlay`, or the installed one."""

    def take(part: int) -> Survey:
        found = revived(run_compiled(survey_part, part, PARTS, timeout=3600, overlay=overlay))
        console.print(
            f"triton {found.triton}, part {part + 1} of {PARTS}: "
            f"{found.by_plan.total()} launches, {len(found.wrong)} wrong"
        )
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


def report(s: Survey, origin: str, console: Console) -> None:
    head = f"ci/recorded_launches.py: {len(s.wrong)} wrong; triton {s.triton}, sm_90, {origin}"
    console.print(f"\n{head}\n", highlight=False)
    table = Table(box=None, show_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in ROWS.items():
        table.add_row(name, f"{count(s):,}")
    table.add_section()
    for kernel in sorted(s.kernels):
        table.add_row(f"launches of {kernel}", f"{s.by_plan[kernel] + s.by_triton[kernel]:,}")
    console.print(table)
    for line in s.wrong:
        console.print(f"\n{line}", highlight=False, markup=False)


def main(
    overlay: Annotated[
        list[Path] | None, typer.Option(help="Folder with another triton; may be given several times.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at once.")] = os.cpu_count() or 1,
    results: Annotated[Path, typer.Option(help="The folder where the tables go.")] = RESULTS / "recorded_launches",
) -> None:
    """What reaches CUDA, by plans and by Triton, compared to the byte."""
    console, origin = Console(width=140), versions("torch")  # now: the tree may be changed meanwhile
    wrong = 0
    results.mkdir(parents=True, exist_ok=True)
    for folder in overlay or [""]:
        found = surveyed(str(folder), jobs, console)
        wrong += len(found.wrong)
        report(found, origin, console)
        with (results / f"triton-{found.triton}.txt").open("w") as file:
            report(found, origin, Console(file=file, width=140))
    raise typer.Exit(wrong > 0)


if __name__ == "__main__":
    typer.run(main)
