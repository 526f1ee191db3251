"""How many instructions the main loops of the tensor-map kernels have had so far: record.json, by compiler and
architecture.

A loop that grows is how a lost pipeline or a load that fell back to pointers shows without a GPU: `cnnfast aot` fails
where one has risen by more than RISE over the record. Where a rise is meant, `cnnfast aot --record` writes what it
found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import triton

if TYPE_CHECKING:
    from .compiling import KernelRow

FILE = Path(__file__).with_suffix(".json")
RISE = 0.15

Record = dict[str, dict[str, int]]  # compiler and architecture -> kernel, variant and tile -> instructions


def compiler(row: KernelRow) -> str:
    """Patch releases of Triton share a record, for they come with the same ptxas."""
    return f"triton {'.'.join(triton.__version__.split('.')[:2])} {row.arch}"


def name(row: KernelRow) -> str:
    return f"{row.kernel}; {row.variant}; {row.tile}"


def recorded(rows: Iterable[KernelRow]) -> list[KernelRow]:
    """Those that a record is kept of."""
    return [row for row in rows if row.kernel.startswith("tma_") and row.loop_instructions is not None]


def risen(rows: Iterable[KernelRow], record: Record | None = None) -> list[str]:
    """One line for each row that has risen too far above its record, and for each without a record though others of
    its compiler and architecture have one.
    """
    known: Record = json.loads(FILE.read_text()) if record is None else record
    found = []
    for row in recorded(rows):
        if compiler(row) not in known:
            continue
        before = known[compiler(row)].get(name(row))
        if before is None:
            found.append(
                f"{row.arch} {name(row)}: no instructions are on record: run cnnfast aot --arch {row.arch} --record"
            )
        elif (row.loop_instructions or 0) > (1 + RISE) * before:
            found.append(
                f"{row.arch} {name(row)}: {row.loop_instructions} instructions in the main loop, {before} on record"
            )
    return found


def write(rows: Sequence[KernelRow], file: Path = FILE) -> None:
    """Replaces what is on record for the compiler and the architectures of `rows`, which are of all cases."""
    record: Record = json.loads(file.read_text()) if file.exists() else {}
    found = recorded(rows)
    record.update({compiler(row): {} for row in found})
    for row in found:
        record[compiler(row)][name(row)] = row.loop_instructions or 0
    file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
