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
from . import sass
from .cases import cases
from .processes import in_processes
from .stub_driver import require_compiled_kernels, target


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One compiled kernel. `loop_instructions`: of the innermost main loop, unrolled as it is in the machine code.
    `wide_loads`: those of its `global_loads` that load 16 bytes a thread.

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


def inspect(binaries: Sequence[Binary]) -> list[dict[str, Any]]:
    """For each of `binaries`, all of one architecture, the fields of a KernelRow that it tells, by name."""
    found = []
    for binary, code in zip(
        binaries, sass.disassemble([b.cubin for b in binaries], binaries[0].capability), strict=True
    ):
        usage = sass.resource_usage(binary.cubin)
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


def compile_case(arch: str, index: int) -> list[tuple[KernelRow, Binary | None]]:
    """Each kernel that case `index` launches, but for those that an earlier case of this process launched too; not
    inspected yet.
    """
    case = cases(capability_of(arch))[index]
    rows: list[tuple[KernelRow, Binary | None]] = []
    clock = time.perf_counter()

    def see(launched: launch.Launched) -> None:
        nonlocal clock
        seconds = time.perf_counter() - clock
        binary = Binary.of(launched.compiled)
        if (binary.capability, binary.digest) not in _reported:
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
    unique: dict[str, tuple[KernelRow, Binary]] = {}
    for row, binary in compiled:
        if binary is not None:
            unique.setdefault(binary.digest, (row, binary))
    told = inspect([binary for _, binary in unique.values()]) if unique else []
    failures = [row for row, binary in compiled if binary is None]
    return failures + [replace(row, **fields) for (row, _), fields in zip(unique.values(), told, strict=True)]
