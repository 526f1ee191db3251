"""The mutation campaign: every deliberate fault of ci/faults.toml must make a test fail that its entry names.

    python ci/mutate.py                  # all of them, ten minutes on two cores
    python ci/mutate.py --only depthwise # those with that word in their name or file

Works on copies of the tree, never in place. A fault is caught if a named test fails, which means that an assertion or
the kernel does: a file that cannot be imported proves nothing. Before that all named tests must pass. Prints a table
and writes it to ci/results/mutations.txt; exit code 1 if a fault survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
from checkout import RESULTS, ROOT, versions
from rich.console import Console
from rich.table import Table

FAULTS = ROOT / "ci" / "faults.toml"
RESULT = RESULTS / "mutations.txt"
TREE = ("cnnfast", "kernels", "tests", "ci", "pyproject.toml", "README.md")
LIMIT = 600  # seconds of one run of tests: a fault may make a loop endless


@dataclass(frozen=True)
class Fault:
    """`old` in `file` becomes `new`; pytest's node ids `tests` are to fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


@dataclass(frozen=True)
class FaultVerdict:
    """outcome "passed", "failed", or "broken": nothing ran, an import or a fixture failed, time was up. `test` is what
    did not pass.
    """

    outcome: str
    test: str = ""
    seconds: float = 0.0


def load(path: Path) -> list[Fault]:
    return [Fault(**entry) for entry in tomllib.loads(path.read_text())["fault"]]


def copy_tree(to: Path) -> None:
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def judge(tree: Path, tests: Sequence[str]) -> FaultVerdict:
    """Runs pytest in a copy of the tree, up to the first test that does not pass."""
    report = tree / "report.xml"
    report.unlink(missing_ok=True)
    # without byte code: a changed file may have the size and the second of the one before it
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment = {**inherited, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    begun = time.perf_counter()
    try:
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return FaultVerdict("broken", "time was up", time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    for kind, outcome in (("error", "broken"), ("failure", "failed")):
        for case in cases:
            if case.find(kind) is not None:
                return FaultVerdict(
                    outcome, f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}", seconds
                )
    passed = [case for case in cases if case.find("skipped") is None]
    return (
        FaultVerdict("passed", "", seconds)
        if run.returncode == 0 and passed
        else FaultVerdict("broken", run.stdout.strip()[-300:], seconds)
    )


def judge_with(tree: Path, fault: Fault) -> FaultVerdict:
    """The tests of a fault with the fault, which is taken back afterwards."""
    path = tree / fault.file
    original = path.read_text()
    if original.count(fault.old) != 1:
        raise typer.BadParameter(
            f"{fault.name}: `old` occurs {original.count(fault.old)} times in {fault.file}, not once"
        )
    path.write_text(original.replace(fault.old, fault.new))
    try:
        return judge(tree, fault.tests)
    finally:
        path.write_text(original)


def table(found: Sequence[tuple[Fault, FaultVerdict]]) -> str:
    rows = Table(box=None, pad_edge=False)
    for column in ("", "fault", "file", "the test that failed", "s"):
        rows.add_column(column, justify="right" if column == "s" else "left", no_wrap=True)
    for fault, verdict in found:
        word = {"failed": "caught", "passed": "SURVIVED", "broken": "BROKEN"}[verdict.outcome]
        rows.add_row(
            word,
            fault.name,
            fault.file.removeprefix("kernels/"),
            verdict.test.replace("\n", " "),
            f"{verdict.seconds:.0f}",
        )
    console = Console(width=240)
    with console.capture() as text:
        console.print(rows, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[str, typer.Option(help="A word in the name or the file of a fault.")] = "",
    faults: Annotated[Path, typer.Option(help="Where they are listed.")] = FAULTS,
    jobs: Annotated[int, typer.Option(help="How many faults are tried side by side.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the result goes, if all faults were tried.")] = RESULT,
) -> None:
    """Plant every fault in a copy of the tree, and see its tests fail."""
    chosen = [fault for fault in load(faults) if only in fault.name or only in fault.file]
    if not chosen:
        raise typer.BadParameter(f"no fault has {only!r} in its name or file", param_hint="--only")
    origin = versions("torch", "triton")  # now: the tree may be changed while copies of it are tried
    with tempfile.TemporaryDirectory() as directory:
        copies = [Path(directory) / str(i) for i in range(jobs)]
        trees: SimpleQueue[Path] = SimpleQueue()
        for tree in copies:
            copy_tree(tree)
            trees.put(tree)

        tests = sorted({test for fault in chosen for test in fault.tests})
        print(f"without a fault: {len(tests)} tests or files of tests ...", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            shares = [share for i in range(jobs) if (share := tests[i::jobs])]
            for before in pool.map(judge, copies, shares):
                if before.outcome != "passed":
                    raise SystemExit(f"the named tests must pass without a fault, but {before.test} {before.outcome}")

        def attempt(fault: Fault) -> tuple[Fault, FaultVerdict]:
            tree = trees.get()
            try:
                verdict = judge_with(tree, fault)
            finally:
                trees.put(tree)
            print(f"{verdict.outcome:7} {verdict.seconds:4.0f} s  {fault.name}", flush=True)
            return fault, verdict

        with ThreadPoolExecutor(jobs) as pool:
            found = list(pool.map(attempt, chosen))

    caught = sum(verdict.outcome == "failed" for _, verdict in found)
    text = f"ci/mutate.py: {caught} of {len(found)} faults caught; {origin}\n\n{table(found)}"
    print(f"\n{text}")
    if not only and faults == FAULTS:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    raise SystemExit(caught < len(found))


if __name__ == "__main__":
    app()
