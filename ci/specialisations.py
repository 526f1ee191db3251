"""What the interpreter accepts must compile: whatever the tests launched in it goes through Triton's compiler.

    PYTEST_ADDOPTS="--specialisations FOLDER" pytest -n 2     # each process of the tests leaves a file in FOLDER
    python ci/specialisations.py front-end FOLDER             # Triton's front end: quick enough for ci/check.sh
    python ci/specialisations.py whole FOLDER                 # all of the compiler: long

A recording serves every version of Triton. Of launches that differ only in numbers the front end sees one;
cnnfast_kernels/aot/specialisations.py says which those are. `whole` compiles every launch, and writes its result to
ci/results/specialisations/. Launches with tensor maps are compiled for architectures that have them. Exit code 1 if one
is refused or a kernel was never launched, 2 if nothing was recorded.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import triton
import typer
from checkout import RESULTS, versions
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cnnfast_kernels.aot import kernel_modules
from cnnfast_kernels.aot.processes import in_processes
from cnnfast_kernels.aot.specialisations import Described, refused, representatives, runs_on

RECORDED = typer.Argument(help="Where the tests recorded their launches.")
JOBS = typer.Option(help="How many processes compile.")


def load(folder: Path) -> list[str]:
    """What all processes recorded, each launch once."""
    lines = sorted({line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()})
    if not lines:
        raise typer.BadParameter(f"nothing is recorded in {folder}: run pytest with --specialisations {folder} first")
    return lines


def compiled(lines: list[str], arch: str, whole: bool, jobs: int) -> list[str]:
    """The reasons of those that are refused."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{'whole' if whole else 'front end'} {arch}")
        results = in_processes(
            refused,
            [(line, arch, whole) for line in lines],
            jobs,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    return [result for result in results if result is not None]


def never_launched(lines: list[str]) -> list[str]:
    missing = set(kernel_modules()) - {Described.of(line).kernel.__name__ for line in lines}
    return [f"{name} was launched by no test that was recorded" for name in sorted(missing)]


app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)


@app.command("front-end")
def front_end(
    folder: Annotated[Path, RECORDED],
    arch: Annotated[str, typer.Option(help="What is compiled for.")] = "sm_90",
    jobs: Annotated[int, JOBS] = 2,
) -> None:
    """Put the launches through Triton's front end, one of those that differ only in numbers."""
    begun = time.perf_counter()
    recorded = load(folder)
    lines = [line for line in recorded if runs_on(line, arch)]
    chosen = representatives(lines)
    failures = compiled(chosen, arch, False, jobs) + never_launched(recorded)
    counts = [Counter(Described.of(line).kernel.__name__ for line in each) for each in (lines, chosen)]
    table = Table("kernel", "launches recorded", "compiled", box=None, pad_edge=False)
    for name, count in sorted(counts[0].items()):
        table.add_row(name, str(count), str(counts[1][name]))
    table.add_row("all", str(len(lines)), str(len(chosen)))
    console = Console()
    console.print(table, markup=False)
    for failure in failures:
        print(f"\n{failure}")
    share = f"{len(chosen)} of {len(lines)} launches, {time.perf_counter() - begun:.0f} s"
    print(f"\ntriton {triton.__version__}'s front end for {arch}: {len(failures)} failures among {share}")
    raise SystemExit(bool(failures))


@app.command()
def whole(
    folder: Annotated[Path, RECORDED],
    arch: Annotated[list[str] | None, typer.Option(help="May be given several times; sm_80 and sm_90 if not.")] = None,
    jobs: Annotated[int, JOBS] = 2,
    out: Annotated[Path, typer.Option(help="The folder of results, a file for each version of Triton.")] = RESULTS
    / "specialisations",
) -> None:
    """Compile every launch, to machine code."""
    origin = versions("torch", "triton")
    lines = load(folder)
    told = [f"ci/specialisations.py whole: {len(lines)} launches of the tests; {origin}", ""]
    failures = never_launched(lines)
    for name in arch or ("sm_80", "sm_90"):
        begun = time.perf_counter()
        able = [line for line in lines if runs_on(line, name)]
        found = compiled(able, name, True, jobs)
        failures += found
        told.append(
            f"{name}: {len(able) - len(found)} of {len(able)} compile, "
            f"{time.perf_counter() - begun:.0f} s by {jobs} processes"
        )
    text = "\n".join([*told, *(f"\n{failure}" for failure in failures)]) + "\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"triton-{triton.__version__}.txt").write_text(text)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    app()
