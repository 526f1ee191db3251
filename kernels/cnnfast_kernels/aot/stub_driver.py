"""A GPU driver without a GPU: Triton compiles for the named architecture, and a launch is recorded instead of executed.

Only for processes in which kernels are compiled, not interpreted. Tensors may be CPU or meta tensors; what a kernel
would have written stays as it was. Works on triton 3.6 to 3.9.

    with target("sm_90"):  # to compile, not to launch
        kernel.warmup(...)
    with stub_driver(arch=90) as gpu:
        fprop(problem, tile, precision, x, w, y)
    assert gpu.compiles == 1 and gpu.launches[0].kernel == "conv_fprop_kernel"
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers
from triton.runtime.jit import JITFunction

from .. import launch
from ..gpus import SHARED_LIMITS, capability_of


def require_compiled_kernels() -> None:
    """Raises RuntimeError where kernels are interpreted: then nothing compiles, here or in the processes that this one
    starts.
    """
    if launch.INTERPRETED:
        raise RuntimeError(
            "kernels are interpreted in this process, not compiled: unset TRITON_INTERPRET and start again"
        )


@dataclass(frozen=True, slots=True)
class StubLaunch:
    """One launch, as the driver received it."""

    kernel: str
    grid: tuple[int, int, int]
    stream: int
    device: int
    function: int  # the loaded binary: launches of one specialisation share it
    metadata: Any  # of the compiled kernel: shared, num_warps, num_stages, target, ...
    arguments: tuple[Any, ...]


class StubDriver:
    """The part of Triton's driver interface that compiling and launching use.

    `device` and `stream` are what Triton is told is current; a test may change them. `compiled` holds Triton's
    CompiledKernel of every new specialisation, in order, whether or not its binary was found in the cache on disk.
    """

    def __init__(self, arch: int, device: int, record: bool) -> None:
        self.arch, self.device, self.stream, self.record = arch, device, 0, record
        self.launches: list[StubLaunch] = []
        self.compiled: list[Any] = []
        self.utils = self
        self.handles = itertools.count(1)

    @property
    def compiles(self) -> int:
        return len(self.compiled)

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = SHARED_LIMITS[self.arch]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads a program may have)"""
        handle = next(self.handles)
        return handle, handle, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What stands in for Triton's launcher of a kernel, which is called with these arguments in this order."""

        def launch(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
            if enter_hook is not None:
                enter_hook(launch_metadata)
            self.launches.append(
                StubLaunch(metadata.name, (x, y, z), stream, self.device, function, metadata, arguments)
            )
            if exit_hook is not None:
                exit_hook(launch_metadata)

        return launch if self.record else lambda *arguments: None


@contextmanager
def active(driver: Any) -> Iterator[None]:
    """Triton compiles and launches by `driver`; the one that was active is active again afterwards."""
    before = drivers._active
    drivers.set_active(driver)
    try:
        yield
    finally:
        drivers.set_active(before)  # type: ignore[arg-type]


@contextmanager
def launching(driver: Any, compiled: list[Any]) -> Iterator[None]:
    """As `active`, for a driver that loads binaries. Triton's handle of everything compiled meanwhile is appended to
    `compiled`.
    """
    do_compile = JITFunction._do_compile

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(do_compile(self, *args, **kwargs))
        return compiled[-1]

    JITFunction._do_compile = note
    try:
        with active(driver):
            yield
    finally:
        JITFunction._do_compile = do_compile
        for kernel in compiled:
            kernel.module = None  # or it would be unloaded when it is collected, by another driver


@contextmanager
def target(arch: str) -> Iterator[None]:
    """Triton compiles for `arch` inside, whatever GPU this machine has. Not for launching: use
    launch.observe(compile_only=True).
    """
    require_compiled_kernels()
    capability = capability_of(arch)
    # Triton keeps compiled kernels by device: a number that an architecture has every time, and no GPU ever.
    with active(StubDriver(capability, 1000 + capability, record=False)):
        yield


# Triton keeps compiled kernels, and limits, by device number: each of these is given out once.
device_numbers = itertools.count(2000)


@contextmanager
def stub_driver(arch: int = 90, record: bool = True) -> Iterator[StubDriver]:
    """Makes Triton compile for sm_`arch` and record launches, or forget them at once: to record one takes as long as to
    plan it.

    The driver that was active is active again afterwards.
    """
    driver = StubDriver(arch, next(device_numbers), record)
    with launching(driver, driver.compiled):
        yield driver
