"""The rows of resources.py: what is compiled for them, written from what was compiled, and compared with it.

A loop that grows is how a lost pipeline or a load that fell back to pointers shows without a GPU: `cnnfast aot` fails
where one has risen by more than RISE over its row, and where the rows that a model reads are no longer those of the
kernels. Where a change is meant, `cnnfast aot --record` writes the rows anew. Patch releases of Triton share a file,
for they come with the same ptxas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import triton

from .. import resources
from ..gpus import capability_of
from ..resources import ResourceKey, Resources
from .cases import Case, cases
from .compiling import KernelRow, compile_case, inspected
from .processes import in_processes
from .searched import searched
from .stub_driver import require_compiled_kernels

RISE = 0.15


def version() -> str:
    """Of the Triton that compiles here, as "3.7"."""
    return ".".join(triton.__version__.split(".")[:2])


def name_of(case: Case) -> tuple[str, str]:
    """The names of a case and of its tile, without its split."""
    return case.name, "" if case.tile is None else str(replace(case.tile, SPLIT_K=1))


@functools.cache
def keys(arch: int) -> dict[tuple[str, str], ResourceKey]:
    """Of what is due on record for sm_`arch`, the key of each case by its name: of all that is searched, or for a
    Triton whose rows no model reads of what `cnnfast aot` compiles of it, to be compared.
    """
    found = {name_of(case): key for key, case in searched(arch).items()}
    if version() == resources.TRITON:
        return found
    compared = set(map(name_of, cases(arch)))
    return {name: key for name, key in found.items() if name in compared}


@functools.cache
def due(arch: int) -> list[Case]:
    """What is due on record for sm_`arch`."""
    return [case for case in searched(arch).values() if name_of(case) in keys(arch)]


def all_due(archs: Iterable[str]) -> list[tuple[str, int]]:
    """(architecture, index of a case) of all that is due for `archs`, each named as in "sm_90"."""
    return [(arch, i) for arch in archs for i, _ in enumerate(due(capability_of(arch)))]


def compile_due(
    archs: Sequence[str], jobs: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[KernelRow]:
    """The rows of all that is due for `archs`, compiled by `jobs` processes (default: one a core). Raises RuntimeError
    where kernels are interpreted.
    """
    require_compiled_kernels()
    work = [(*item, due) for item in all_due(archs)]
    compiled = zip(work, in_processes(compile_case, work, jobs, progress), strict=True)
    rows: list[KernelRow] = []
    for arch, of_arch in groupby(compiled, key=lambda done: done[0][0]):
        of_cases = [row for _, rows_of_case in of_arch for row in rows_of_case]
        own = {key.kernel for key in keys(capability_of(arch)).values()}
        rows += [row for row, binary in of_cases if binary is None]
        rows += inspected([(row, binary) for row, binary in of_cases if binary is not None and row.kernel in own])
    return rows


def keyed(rows: Iterable[KernelRow]) -> dict[ResourceKey, KernelRow]:
    """The rows that are due on record, by their keys."""
    found: dict[ResourceKey, KernelRow] = {}
    for row in rows:
        key = keys(capability_of(row.arch)).get((row.variant, row.tile.partition(" split ")[0]))
        if key is not None and key.kernel == row.kernel:
            found[key] = row
    return found


def taken(row: KernelRow) -> Resources:
    """What a row says that its kernel takes."""
    loop, other = round(row.step_instructions or 0, 1), row.other_instructions or 0
    return Resources(row.registers or 0, row.shared_bytes or 0, loop, other, spill_bytes=row.spill_bytes or 0)


def differences(now: Resources, before: Resources) -> list[str]:
    """What is no longer as it was, in words: a loop that has risen by more than RISE; or else, where a model reads
    them, every number that has moved by more.
    """
    steps = f"{now.loop_instructions:g} instructions in a step of the main loop, {before.loop_instructions:g} on record"
    if now.loop_instructions > (1 + RISE) * before.loop_instructions:
        return [steps]
    if version() != resources.TRITON:
        return []
    names = "registers", "shared_bytes", "loop_instructions", "other_instructions"
    pairs = [(name, getattr(now, name), getattr(before, name)) for name in names]
    return [
        f"{name} {number:g}, {known:g} on record" for name, number, known in pairs if abs(number - known) > RISE * known
    ]


def departures(rows: Iterable[KernelRow]) -> list[str]:
    """One line for each row that is not as it is on record, and for each that is not on record though others of its
    compiler and architecture are.
    """
    found = []
    for key, row in keyed(rows).items():
        known = resources.rows_of(key.arch, version())
        name, before = f"{row.arch} {row.kernel}; {row.variant}; {row.tile}", known.get(key)
        if before is not None:
            found += [f"{name}: {difference}" for difference in differences(taken(row), before)]
        elif known:
            found.append(f"{name}: it is not on record: run cnnfast aot --arch {row.arch} --record")
    return found


def write(rows: Sequence[KernelRow]) -> list[Path]:
    """Replaces the files of this Triton for the architectures of `rows`, which are of all that is due. Returns them."""
    by_arch: dict[int, dict[ResourceKey, Resources]] = {}
    for key, row in keyed(rows).items():
        by_arch.setdefault(key.arch, {})[key] = taken(row)
    files = []
    for arch, found in by_arch.items():
        files.append(resources.file_of(arch, version()))
        resources.write(files[-1], found)
    resources.rows_of.cache_clear()
    return files
