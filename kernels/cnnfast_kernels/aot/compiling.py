"""Compiles every kernel for a GPU that need not be there, and reads what the machine code says about it.

    rows = compile_all(["sm_90"])
    for line in problems(rows):  # judging.py
        print(line)

Kernels must not be interpreted in this process (TRITON_INTERPRET unset). `seconds` are those of a first compilation,
the first of each process with Triton's own start: what Triton finds in its cache on disk takes milliseconds.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from .. import launch
from ..gpus import SHARED_LIMITS, capability_of
from ..resources import shape_of
from . import sass
from .cases import Case, cases
from .issue import Product, issued
from .processes import in_processes
from .stub_driver import require_compiled_kernels, target


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One compiled kernel. `loop_instructions`: of the innermost main loop, unrolled as it is in the machine code.
    `step_instructions`, `other_instructions`: those that a warp of a convolution's kernel issues in one k-step, and
    outside of the main loop. `wide_loads`: those of its `global_loads` that load 16 bytes a thread.

    `dot`: what it multiplies in tl.dot, "f16" "bf16" "tf32" "f32" "f64", or None without any. A row with an error has
    nothing else.
    """

    kernel: str
    variant: str
    tile: str
    arch: str
    seconds: float = 0.0
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    shared_limit: int | None = None
    dot: str | None = None
    tensor_core: str | None = None
    async_copies: int | None = None
    tensor_loads: int | None = None
    global_loads: int | None = None
    wide_loads: int | None = None
    serialised: bool | None = None
    loop_instructions: int | None = None
    step_instructions: float | None = None
    other_instructions: float | None = None
    error: str | None = None


def dot_operands(ttir: str) -> str | None:
    """What Triton's intermediate code multiplies: the dtype of tl.dot's operands, "tf32" for float32 that may be
    rounded.
    """
    match = re.search(r"tt\.dot [^\n]*: tensor<\d+x\d+x(\w+)[^\n]*", ttir)
    if not match:
        return None
    return "tf32" if match[1] == "f32" and "inputPrecision = tf32" in match[0] else match[1]


@dataclass(frozen=True, slots=True)
class Binary:
    """What Triton's compiled kernel leaves to inspect, and what can travel between processes."""

    digest: str
    capability: int
    cubin: bytes
    shared_bytes: int
    dot: str | None

    @classmethod
    def of(cls, compiled: Any) -> Binary:
        metadata = compiled.metadata
        return cls(
            compiled.hash,
            metadata.target.arch,
            compiled.asm["cubin"],
            metadata.shared,
            dot_operands(compiled.asm["ttir"]),
        )


# Of a number that tl.dot multiplies, by the name that Triton's intermediate code gives it.
NUMBER_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "f64": 8}


def product_of(row: KernelRow, binary: Binary) -> Product | None:
    """What a kernel multiplies in a k-step; None for one whose tile says nothing of it."""
    shape = shape_of(row.kernel, row.tile.partition(" split ")[0])
    if shape is None or binary.dot is None:
        return None
    rows, columns = shape.rows, shape.columns
    if row.kernel in ("tma_fprop_kernel", "tma_dgrad_kernel"):  # their accumulators have pixels along columns
        rows, columns = columns, rows
    return Product(rows, columns, shape.depth, shape.warps, NUMBER_BYTES[binary.dot])


def inspect(compiled: Sequence[tuple[KernelRow, Binary]]) -> list[dict[str, Any]]:
    """For each kernel, all of one architecture, the fields of a KernelRow that its binary tells, by name."""
    found = []
    cubins, capability = [binary.cubin for _, binary in compiled], compiled[0][1].capability
    for (row, binary), code in zip(compiled, sass.disassemble(cubins, capability), strict=True):
        usage = sass.resource_usage(binary.cubin)
        issues = issued(code, product_of(row, binary)) if row.tile else None
        found.append(
            {
                "registers": sass.registers(usage),
                "spill_bytes": sass.spill_bytes(code, usage),
                "shared_bytes": binary.shared_bytes,
                "shared_limit": SHARED_LIMITS[binary.capability],
                "dot": binary.dot,
                "tensor_core": sass.tensor_core(code),
                "async_copies": sass.async_copies(code),
                "tensor_loads": sass.tensor_loads(code),
                "global_loads": sass.global_loads(code),
                "wide_loads": sass.wide_loads(code),
                "serialised": sass.serialised(code),
                "loop_instructions": sass.loop_instructions(code),
                "step_instructions": None if issues is None else issues.loop,
                "other_instructions": None if issues is None else issues.other,
            }
        )
    return found


@contextmanager
def stderr_captured() -> Iterator[Callable[[], str]]:
    """The compiler writes the reason of a failure to the file descriptor, from C++; the exception only says that it
    failed.
    """
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield text
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def reason(error: Exception, said: str) -> str:
    """Why a compilation ended: the error, those that it came from, and what the compiler `said` about errors."""
    told, cause = [], error
    while cause is not None:
        told.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "\n".join([*told, *(line for line in said.splitlines() if "error:" in line)])[:2000]


_reported: set[tuple[int, str]] = set()  # architecture and hash of the kernels that this process has reported


def compile_case(
    arch: str, index: int, of: Callable[[int], Sequence[Case]] = cases
) -> list[tuple[KernelRow, Binary | None]]:
    """Each kernel that case `index` launches, not inspected yet. Of `cases`, those alone that no earlier case of this
    process launched too.
    """
    case = of(capability_of(arch))[index]
    rows: list[tuple[KernelRow, Binary | None]] = []
    clock = time.perf_counter()

    def see(launched: launch.Launched) -> None:
        nonlocal clock
        seconds = time.perf_counter() - clock
        binary = Binary.of(launched.compiled)
        if of is not cases or (binary.capability, binary.digest) not in _reported:
            _reported.add((binary.capability, binary.digest))
            tile = "" if launched.tile is None else str(launched.tile)
            rows.append((KernelRow(launched.kernel, case.name, tile, arch, round(seconds, 3)), binary))
        clock = time.perf_counter()

    with stderr_captured() as said, target(arch), launch.observe(see, compile_only=True):
        try:
            case.run()
        except Exception as error:  # whatever a compiler raises: a row must say so, and the others be compiled
            rows.append((KernelRow("", case.name, "", arch, error=reason(error, said())), None))
    return rows


def selected(archs: Sequence[str], only: str = "") -> list[tuple[str, int]]:
    """(architecture, index of a case) of every case whose name contains `only`, for each of `archs`. Nothing is
    compiled.

    Architectures are named as in "sm_90", each once, however the caller wrote them. Raises ValueError, which says what
    there is to choose from, for an architecture that is not known here and for an `only` that no case's name contains.
    """
    capabilities = list(dict.fromkeys(map(capability_of, archs)))
    named = [
        (f"sm_{capability}", i, case.name) for capability in capabilities for i, case in enumerate(cases(capability))
    ]
    work = [(arch, i) for arch, i, name in named if only in name]
    if not work:
        beginnings = sorted({name.split()[0] for _, _, name in named})
        raise ValueError(f"only={only!r} is in no case's name: names begin with {', '.join(beginnings)}")
    return work


def compile_all(
    archs: Sequence[str],
    only: str = "",
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[KernelRow]:
    """Rows of every case whose name contains `only`, for each of `archs`, compiled by `jobs` processes (default: one a
    core).

    The same machine code is one row, however many cases need it. `progress` is called with (cases done, all cases).
    Raises ValueError as `selected` does, and RuntimeError where kernels are interpreted; both before anything is
    compiled.
    """
    work = selected(archs, only)
    require_compiled_kernels()
    compiled = zip(work, in_processes(compile_case, work, jobs, progress), strict=True)
    by_arch = groupby(compiled, key=lambda done: done[0][0])
    return [row for _, of_arch in by_arch for row in finished([row for _, rows in of_arch for row in rows])]


def finished(compiled: Sequence[tuple[KernelRow, Binary | None]]) -> list[KernelRow]:
    """Failures, then the rows of one architecture with all that inspection tells; the same binary is one row."""
    failures = [row for row, binary in compiled if binary is None]
    unique: dict[str, tuple[KernelRow, Binary]] = {}
    for row, binary in compiled:
        if binary is not None:
            unique.setdefault(binary.digest, (row, binary))
    return failures + inspected([*unique.values()])


def inspected(compiled: Sequence[tuple[KernelRow, Binary]]) -> list[KernelRow]:
    """The rows, all of one architecture, with all that inspection tells."""
    told = inspect(compiled) if compiled else []
    return [replace(row, **fields) for (row, _), fields in zip(compiled, told, strict=True)]
