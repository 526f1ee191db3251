"""What must not be shipped, told from the rows of compiled kernels: compiling.py makes them."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module

import triton

from .. import tma
from ..gpus import capability_of
from ..tma.views import why_not_on
from .compiling import KernelRow


def problems(rows: Iterable[KernelRow]) -> list[str]:
    """What must not be shipped, one line each: failures, spills, too much shared memory, idle tensor cores, waits after
    every wgmma.
    """
    found = []
    for row in rows:
        if row.error is not None:
            found.append(f"{row.arch} {row.variant}: does not compile: {row.error}")
            continue
        name = f"{row.arch} {row.kernel} ({row.variant}; {row.tile})"
        if row.spill_bytes:
            found.append(f"{name}: spills {row.spill_bytes} bytes a thread, {row.registers} registers")
        if (row.shared_bytes or 0) > (row.shared_limit or 0):
            found.append(f"{name}: needs {row.shared_bytes} bytes of shared memory, {row.shared_limit} are allowed")
        if row.dot in ("f16", "bf16", "tf32") and row.tensor_core is None:
            found.append(f"{name}: multiplies {row.dot} without tensor cores")
        if row.kernel.startswith("tma_") and not (row.tensor_loads and row.tensor_core in ("HGMMA", "UTCHMMA")):
            found.append(
                f"{name}: {row.tensor_loads} loads by tensor maps, and {row.tensor_core} in place of wgmma or tcgen05"
            )
        if row.serialised:
            found.append(f"{name}: waits after every wgmma")
    return found


def kernel_modules() -> dict[str, str]:
    """Every kernel of this package, which are its jit functions whose name ends in _kernel, with the module that
    defines it.
    """
    package = import_module(__name__.partition(".")[0])
    found = {}
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, value in vars(import_module(module.name)).items():
            if name.endswith("_kernel") and isinstance(value, triton.runtime.KernelInterface):
                found[name] = value.fn.__module__  # type: ignore[attr-defined]
    return found


def due_on(arch: str) -> set[str]:
    """Kernels that can be chosen on an architecture, and so must be among its cases: those of package tma only where
    they run.
    """
    mapped = not why_not_on(capability_of(arch))
    return {name for name, module in kernel_modules().items() if mapped or not module.startswith(f"{tma.__name__}.")}


def uncovered(rows: Iterable[KernelRow]) -> list[str]:
    """One line for each kernel that can be chosen on an architecture of the rows though no row there is that
    kernel's.
    """
    compiled: dict[str, set[str]] = {}
    for row in rows:
        compiled.setdefault(row.arch, set()).add(row.kernel)
    missing = [(arch, kernel) for arch, kernels in compiled.items() for kernel in sorted(due_on(arch) - kernels)]
    return [f"{arch} {kernel}: no case compiles it (aot/cases.py)" for arch, kernel in missing]
