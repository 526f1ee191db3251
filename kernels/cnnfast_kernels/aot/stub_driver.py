"""A GPU driver without a GPU: Triton compiles for the named architecture, and a launch is recorded instead of executed.

Only for processes in which kernels are compiled, not interpreted (child.run_compiled starts one). Tensors may be CPU or
meta tensors; what a kernel would have written stays as it was. Works on triton 3.6 to 3.9.

    with stub_driver(arch=90) as gpu:
        fprop(problem, tile, precision, x, w, y)
    assert gpu.compiles == 1 and gpu.launches[0].kernel == "conv_fprop_kernel"
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Bytes a program may have; Triton refuses to launch a kernel that needs more.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


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


@dataclass(slots=True)
class Recorder:
    """What happened under stub_driver. `device` and `stream` are what Triton is told is current; a test may change
    them.
    """

    arch: int
    device: int
    stream: int = 0
    launches: list[StubLaunch] = field(default_factory=list)
    compiled: list[Any] = field(default_factory=list)  # Triton's CompiledKernel of every new specialisation, in order

    @property
    def compiles(self) -> int:
        """New specialisations, whether or not Triton found their binary in its cache on disk."""
        return len(self.compiled)


class StubDriver:
    """The part of Triton's driver interface that compiling and launching use."""

    def __init__(self, recorder: Recorder, record: bool) -> None:
        self.recorder, self.record = recorder, record
        self.target = GPUTarget("cuda", recorder.arch, 32)
        self.utils = self
        self.handles = itertools.count(1)

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.recorder.device

    def get_current_stream(self, device: int) -> int:
        return self.recorder.stream

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = SHARED_MEMORY[self.recorder.arch]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads a program may have)"""
        handle = next(self.handles)
        return handle, handle, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(
            grid_x,
            grid_y,
            grid_z,
            stream,
            function,
            packed_metadata,
            launch_metadata,
            enter_hook,
            exit_hook,
            *arguments,
        ):
            grid = (grid_x, grid_y, grid_z)
            if enter_hook is not None:
                enter_hook(launch_metadata)
            self.recorder.launches.append(
                StubLaunch(metadata.name, grid, stream, self.recorder.device, function, metadata, arguments)
            )
            if exit_hook is not None:
                exit_hook(launch_metadata)

        return launch if self.record else lambda *arguments: None


# A device number that no other driver used: Triton keeps compiled kernels, and limits, by device number.
device_numbers = itertools.count(1000)


@contextmanager
def stub_driver(arch: int = 90, record: bool = True) -> Iterator[Recorder]:
    """Makes Triton compile for sm_`arch` and record launches, or forget them at once: to record one takes as long as to
    plan it.

    The driver that was active is active again afterwards.
    """
    recorder = Recorder(arch, next(device_numbers))
    do_compile, before = JITFunction._do_compile, driver._active

    def record_compile(self, *args, **kwargs):
        kernel = do_compile(self, *args, **kwargs)
        recorder.compiled.append(kernel)
        return kernel

    JITFunction._do_compile = record_compile
    driver.set_active(StubDriver(recorder, record))  # type: ignore[arg-type]
    try:
        yield recorder
    finally:
        JITFunction._do_compile = do_compile
        driver.set_active(before)  # type: ignore[arg-type]
        for kernel in recorder.compiled:
            kernel.module = None  # nothing was loaded: nothing to unload when it is collected
