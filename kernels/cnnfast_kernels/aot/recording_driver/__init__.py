"""Triton's real launcher without a GPU: over a libcuda.so.1 that runs nothing, and keeps what it was asked to launch.

    with recording_driver(90) as driver:
        fprop(problem, tile, precision, x, w, y)
        launches, encodes = driver.taken()
    assert launches[0].parameters[0] == x.data_ptr().to_bytes(8, "little")

Triton compiles, loads and launches by its own code: what is recorded is what would have reached CUDA. Tensors are the
CPU's; what a kernel would have written stays as it was. Only for a process of its own, in which kernels are compiled
and no other libcuda was loaded, because the library stays in the process. Needs a C compiler, as Triton does. Works on
triton 3.6 to 3.9.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.nvidia import driver as nvidia

from ... import launch
from ...gpus import SHARED_LIMITS
from .. import sass, stub_driver
from . import library
from .records import LoadedKernel, RecordedEncode, RecordedLaunch

__all__ = ["LoadedKernel", "RecordedEncode", "RecordedLaunch", "RecordingDriver", "recording_driver"]

# What Triton's launcher writes for an argument of each type, and for each type in the C code of version 3.6.
WRITTEN_BYTES = {f"{sign}{bits}": bits // 8 for sign in "iu" for bits in (8, 16, 32, 64)}
WRITTEN_BYTES |= {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8, "*i8": 8, "nvTmaDesc": 128}
C_BYTES = {f"{sign}int{bits}_t": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)} | {
    "CUdeviceptr": 8,
    "CUtensorMap": 128,
}


def passed_bytes(launcher: Any, source: Any, metadata: Any) -> tuple[int, ...]:
    """The sizes of what Triton's `launcher` of a kernel passes, as the launcher itself has them."""
    # from 3.7 on: a byte for each, which is the number of a function that writes one
    if hasattr(launcher, "kernel_signature"):
        build_signature: Any = nvidia.CudaUtils.instance.build_signature_metadata  # type: ignore[attr-defined]
        written = {build_signature([name])[0]: size for name, size in WRITTEN_BYTES.items()}
        sizes = [written[number] for number in launcher.kernel_signature]
    else:  # 3.6: C code for each signature; constexpr parameters are not among the declarations of its _launch
        make_launcher: Any = nvidia.make_launcher  # type: ignore[attr-defined]
        code = make_launcher({}, dict(source.signature), getattr(metadata, "tensordesc_meta", None))
        declared = re.search(r"static void _launch\(([^)]*)\)", code)
        assert declared
        sizes = [C_BYTES[type_] for type_ in re.findall(r"(\w+) arg\d+", declared[1])]
    return (*sizes, 8, 8)


class RecordingDriver(nvidia.CudaDriver):
    """Triton's own driver of one GPU that is not there. `device`, `stream` and `capability` (90 for sm_90) are what
    Triton is told of it; a test may change the first two. `kernels` are the binaries that were loaded, by the function
    that launches name.
    """

    def __init__(self, capability: int, device: int, record: bool) -> None:
        # CudaDriver's own constructor would ask torch for a GPU.
        self.library = library.load()
        self.capability, self.device, self.stream = capability, device, 0
        self.kernels: dict[int, LoadedKernel] = {}
        self.library.recorder_start(capability, SHARED_LIMITS[capability], record)
        # A copy, because Triton keeps one CudaUtils for the whole process.
        self.utils: Any = SimpleNamespace(**vars(nvidia.CudaUtils()))
        self._load_binary = self.utils.load_binary
        self.utils.load_binary = self.load_binary
        self.launcher_cls: Any = self.make_launcher
        self._made = threading.local()
        self.get_current_device: Any = lambda: self.device
        self.get_current_stream: Any = lambda device: self.stream
        self.get_device_capability: Any = lambda device=0: divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def make_launcher(self, source: Any, metadata: Any) -> Any:
        """Triton's launcher. Triton makes it just before it loads the binary, in the same thread."""
        launcher = nvidia.CudaLauncher(source, metadata)
        self._made.passed_bytes, self._made.metadata = passed_bytes(launcher, source, metadata), metadata
        return launcher

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """As Triton's, which gives (module, function, registers, spills, most threads a block may have)."""
        loaded = self._load_binary(name, binary, shared, device)
        expected, passed = tuple(sass.parameter_bytes(binary)), self._made.passed_bytes
        scratch = self._made.metadata.global_scratch_size, self._made.metadata.profile_scratch_size
        self.kernels[loaded[1]] = LoadedKernel(
            name, hashlib.sha256(binary).hexdigest()[:16], expected, passed, *scratch
        )
        # where they differ, no byte is read that was not passed
        sizes = [min(pair) for pair in zip(expected, passed, strict=False)]
        if not self.library.recorder_expect(loaded[1], len(sizes), (ctypes.c_uint32 * len(sizes))(*sizes)):
            raise ValueError(f"kernel {name} has {len(sizes)} parameters, more than libcuda.c has room for")
        return loaded

    def taken(self) -> tuple[list[RecordedLaunch], list[RecordedEncode]]:
        """What was launched and encoded since the last call, in order. A thread that is launching just now is not
        waited for.
        """
        launches, encodes = ctypes.POINTER(library.LaunchStruct)(), ctypes.POINTER(library.EncodeStruct)()
        data = ctypes.POINTER(ctypes.c_ubyte)()
        count = self.library.recorder_launches(ctypes.byref(launches))
        maps = self.library.recorder_encodes(ctypes.byref(encodes))
        kept = ctypes.string_at(data, self.library.recorder_bytes(ctypes.byref(data))) if count else b""
        found = [self._launched(launches[i], kept) for i in range(count)], [_encoded(encodes[i]) for i in range(maps)]
        self.library.recorder_forget()
        return found

    def _launched(self, it: Any, kept: bytes) -> RecordedLaunch:
        kernel = self.kernels[it.function]
        sizes = [min(pair) for pair in zip(kernel.parameter_bytes, kernel.passed_bytes, strict=False)]
        sizes += [it.attribute_bytes // it.attributes] * it.attributes if it.attributes else []
        ends = list(itertools.accumulate(sizes, initial=it.start))
        pieces = [kept[start:end] for start, end in itertools.pairwise(ends)]
        parameters, attributes = pieces[: len(pieces) - it.attributes], pieces[len(pieces) - it.attributes :]
        assert sum(map(len, parameters)) == it.parameter_bytes
        grid, block = tuple(it.grid), tuple(it.block)
        return RecordedLaunch(
            it.function, it.stream, grid, block, it.shared_bytes, tuple(parameters), tuple(attributes)
        )


def _encoded(it: Any) -> RecordedEncode:
    axes = {name: tuple(getattr(it, name)[: it.rank]) for name in ("dims", "strides", "box", "element_strides")}
    rest = {
        name: getattr(it, name)
        for name in ("address", "type", "element_bytes", "interleave", "swizzle", "promotion", "fill")
    }
    return RecordedEncode(**axes, **rest, refusal=it.refusal.decode())


@contextmanager
def recording_driver(capability: int = 90, record: bool = True) -> Iterator[RecordingDriver]:
    """Makes Triton compile for sm_`capability` and launch over a driver that records; that forgets at once if not
    `record`.

    The driver that was active is active again afterwards. Raises RuntimeError where kernels are interpreted, where
    another libcuda is loaded, and where there is no C compiler; ValueError for an architecture that is not known here.
    """
    if launch.INTERPRETED:
        raise RuntimeError(
            "kernels are interpreted in this process, not launched: unset TRITON_INTERPRET and start again"
        )
    if capability not in SHARED_LIMITS:
        raise ValueError(f"capability={capability} is not known here: use one of {', '.join(map(str, SHARED_LIMITS))}")
    driver = RecordingDriver(capability, next(stub_driver.device_numbers), record)
    with stub_driver.launching(driver, []):
        yield driver
