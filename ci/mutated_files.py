"""Files of frozen networks, changed at random: none ends the process that reads it, or takes its time or its memory.

    python ci/mutated_files.py                              # 2,000 files: some two minutes
    python ci/mutated_files.py --cases 100 --seed 7

Bytes are flipped, cut and spliced; the description is changed in its structure, with other operators, arguments and
numbers; tensors get other shapes, dtypes and places. The digest is made right in half of them. Each either is read as
what it was, or refused by a ValueError that names it; with the digest made right it may be another network, which runs.
tests/support/mutated_files.py has the changes, and what else is held against a file: a second of the processor's time,
memory, and files, sockets and imports that it has nothing to do with. What came of them is printed, and written to
ci/results/mutated_files.txt.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from checkout import RESULTS, ROOT, versions

BATCH = 250  # files that one process reads, so that one which ends it is told from the others


def outcomes(seed: int, first: int, last: int) -> tuple[list[dict[str, Any]], int]:
    """What came of files, and how many bytes they took at most. A process that ends early has read the file that ended
    it last; another one goes on behind it.
    """
    found: list[dict[str, Any]] = []
    peak = 0
    while first < last:
        command = [sys.executable, "-m", "tests.support.mutated_files", str(seed), str(first), str(last)]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = list(map(json.loads, done.stdout.splitlines()))
        cases = [line for line in lines if "index" in line]
        found += cases
        first += len(cases)
        peak = max([peak, *(line["peak"] for line in lines if "peak" in line)])
        if first < last:
            said = done.stderr.strip().splitlines()[-1:]
            outcome = f"FAILED: ended the process, with {done.returncode}: {said}"
            found.append({"index": first, "what": "unknown", "signed": first % 2 == 0, "outcome": outcome})
            first += 1
    return found, peak


def table(found: list[dict[str, Any]]) -> str:
    """A line for each change: how many files, and what came of them."""
    kinds = Counter((case["what"], case["outcome"].partition(":")[0]) for case in found)
    columns = sorted({outcome for _, outcome in kinds})
    width = max(len(what) for what, _ in kinds)
    lines = ["".join([" " * width, *(f"  {column}" for column in columns)])]
    for what in [*sorted({what for what, _ in kinds}), "all"]:
        counts = [sum(n for (w, o), n in kinds.items() if o == column and what in (w, "all")) for column in columns]
        lines.append("".join([f"{what:{width}}", *(f"  {n:>{len(c)}}" for n, c in zip(counts, columns, strict=True))]))
    return "\n".join(lines)


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    cases: Annotated[int, typer.Option(help="How many files.")] = 2000,
    seed: Annotated[int, typer.Option(help="Another one changes them otherwise.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "mutated_files.txt",
) -> None:
    """Read files of frozen networks that were changed at random."""
    head = f"ci/mutated_files.py --cases {cases} --seed {seed}: {versions('torch', 'safetensors')}\n"
    print(head, flush=True)
    found: list[dict[str, Any]] = []
    peak = 0
    for first in range(0, cases, BATCH):
        more, most = outcomes(seed, first, min(first + BATCH, cases))
        found += more
        peak = max(peak, most)
    failed = [case for case in found if case["outcome"].startswith("FAILED")]
    memory = f"memory beyond what unchanged files take: {peak / 2**20:.0f} MiB at most"
    text = f"{table(found)}\n\n{memory}\n{len(failed)} failed"
    print(text, flush=True)
    for case in failed:
        print(f"{case['index']} {case['what']}, digest made right: {case['signed']}: {case['outcome']}")
    out.write_text(f"{head}\n{text}\n")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
