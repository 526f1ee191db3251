"""Every kernel and tile compiled ahead of time by every Triton of the gate for every architecture that it compiles for.

    python ci/aot_matrix.py                                           # all twelve combinations
    python ci/aot_matrix.py --triton 3.7.1 --arch sm_89 --only dgrad  # one of them, cases with dgrad in their name

Each Triton is installed into a folder that is thrown away, with the numpy that it needs: pip has to find it. `cnnfast
aot` runs on it, once an architecture. Prints a table and the problems, and writes them to ci/results/aot.txt; exit code
1 if there is a problem.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from checkout import RESULTS, ROOT, versions
from rich.console import Console
from rich.table import Table

RESULT = RESULTS / "aot.txt"
# With what each needs beside it: those that ci/check.sh installs.
TRITONS = {"3.6.0": ["numpy<2.4"], "3.7.1": [], "3.9.0": []}
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100")


@dataclass(frozen=True)
class Combination:
    """What one Triton made of the kernels for one architecture. `registers` and `spill_bytes` are those of the worst
    kernel, a thread; `seconds` are those of the whole command.
    """

    triton: str
    arch: str
    rows: int
    problems: tuple[str, ...]
    registers: int
    spill_bytes: int
    seconds: float


def install(triton: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"triton=={triton}", *TRITONS[triton]], check=True)


def told(triton: str, arch: str, output: str, rows: Sequence[dict[str, Any]], seconds: float) -> Combination:
    """From what `cnnfast aot` printed and the rows that it wrote. Raises ValueError if they do not fit each other."""
    problems = tuple(line.removeprefix("problem ") for line in output.splitlines() if line.startswith("problem "))
    end = re.search(r"^(\d+) kernels compiled, (\d+) problems$", output, re.MULTILINE)
    if end is None or (int(end[1]), int(end[2])) != (len(rows), len(problems)):
        raise ValueError(
            f"cnnfast aot --arch {arch} on triton {triton} wrote {len(rows)} rows and ended with:\n{output[-2000:]}"
        )

    def worst(field: str) -> int:
        return max((row[field] or 0 for row in rows), default=0)

    return Combination(triton, arch, len(rows), problems, worst("registers"), worst("spill_bytes"), seconds)


def compile_on(triton: str, overlay: Path, arch: str, only: str, jobs: int, scratch: Path) -> Combination:
    """One run of the command, which shows its progress itself."""
    file = scratch / f"{triton}-{arch}.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (overlay, ROOT, ROOT / "kernels")))
    environment["TRITON_CACHE_DIR"] = str(scratch / "cache")
    used = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
    )
    if used.stdout.strip() != triton:
        raise RuntimeError(
            f"triton {triton} was installed into {overlay}, but {used.stdout.strip() or used.stderr} is imported"
        )
    command = [
        sys.executable,
        "-m",
        "cnnfast",
        "aot",
        "--arch",
        arch,
        "--json",
        str(file),
        "--jobs",
        str(jobs),
        "--only",
        only,
    ]
    begun = time.perf_counter()
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}\n{run.stdout}")
    return told(triton, arch, run.stdout, json.loads(file.read_text()), time.perf_counter() - begun)


def table(found: Sequence[Combination]) -> str:
    """One line a combination, then the problems."""
    grid = Table(box=None, pad_edge=False)
    for column in ("triton", "arch"):
        grid.add_column(column, no_wrap=True)
    for column in ("rows", "problems", "worst registers", "worst spill", "seconds"):
        grid.add_column(column, justify="right", no_wrap=True)
    for c in found:
        numbers = (c.rows, len(c.problems), c.registers, c.spill_bytes, round(c.seconds))
        grid.add_row(c.triton, c.arch, *map(str, numbers))
    console = Console(width=120)
    with console.capture() as text:
        console.print(grid, markup=False, highlight=False)
    lines = [line.rstrip() for line in text.get().splitlines()]
    return "\n".join(lines + [f"\ntriton {c.triton}: {problem}" for c in found for problem in c.problems])


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    triton: Annotated[
        list[str] | None, typer.Option(help="One of the gate's; may be repeated.", show_default="all")
    ] = None,
    arch: Annotated[list[str] | None, typer.Option(help="May be repeated.", show_default=" ".join(ARCHS))] = None,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the result goes, if it is of all combinations and cases.")] = RESULT,
) -> None:
    """Compile every kernel by every Triton of the gate, for every architecture."""
    tritons, archs = triton or list(TRITONS), arch or list(ARCHS)
    if unknown := [name for name in tritons if name not in TRITONS]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(TRITONS)}", param_hint="--triton")
    origin = versions("torch")  # now: the tree may be changed meanwhile
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for name in tritons:
            overlay = Path(directory) / name
            print(f"installing triton {name} ...", flush=True)
            install(name, overlay)
            for target in archs:
                found.append(compile_on(name, overlay, target, only, jobs, Path(directory)))
                print(f"triton {name}, {target}: {found[-1].rows} rows, {len(found[-1].problems)} problems", flush=True)

    problems = sum(len(combination.problems) for combination in found)
    text = f"ci/aot_matrix.py: {problems} problems in {len(found)} combinations; {origin}\n\n{table(found)}"
    print(f"\n{text}")
    if not only and (tuple(tritons), tuple(archs)) == (tuple(TRITONS), ARCHS):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    raise SystemExit(problems > 0)


if __name__ == "__main__":
    app()
