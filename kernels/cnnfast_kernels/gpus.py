"""GPUs that can be spoken of without being here: what CUDA calls them, what they are compiled for, and how fast their
parts are.

Pure Python: imports neither torch nor triton. What a data sheet or a white paper of NVIDIA says is cited. "Assumed" is
what no such document says, above all the rates that are reached: none of them was measured by this project.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Product = Literal["half", "tf32", "ieee", "fp64"]


class Multiprocessor(NamedTuple):
    """What the programs of one multiprocessor share: bytes of shared memory, warps and programs that may live on it at
    once, and 32-bit registers.
    """

    shared: int
    warps: int
    programs: int
    registers: int = 65536


# By architecture, 90 for sm_90: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 64, 32),
    86: Multiprocessor(100 * 1024, 48, 16),
    87: Multiprocessor(164 * 1024, 48, 16),
    89: Multiprocessor(100 * 1024, 48, 24),
    90: Multiprocessor(228 * 1024, 64, 32),
    100: Multiprocessor(228 * 1024, 64, 32),
    103: Multiprocessor(228 * 1024, 64, 32),
    120: Multiprocessor(100 * 1024, 48, 24),
}
# Bytes of shared memory that CUDA keeps of every program: the same guide, "Shared Memory" of compute capability 8.x.
RESERVED = 1024
# Bytes of shared memory that one program may have, by architecture.
SHARED_LIMITS = {arch: m.shared - RESERVED for arch, m in MULTIPROCESSORS.items()}

# That a multiprocessor has, each of which issues an instruction of a warp in a clock: the same guide, "Architecture" of
# compute capabilities 8.x and 9.0.
SCHEDULERS = 4
# Bytes that a multiprocessor reads or writes in a clock: of its shared memory, by the same guide (32 banks of 32 bits),
# and of the second-level cache: assumed.
SHARED_CLOCK = 128
CACHE_CLOCK = 64


class ProductRates(NamedTuple):
    """FLOPs of one multiprocessor in a clock, by precision: "half" and "tf32" with float32 accumulation, dense; "ieee"
    is float32 and "fp64" float64, by matrix units where they take it.
    """

    half: int
    tf32: int
    ieee: int
    fp64: int


class KnownGpu(NamedTuple):
    """name: what people type. cuda: the name that CUDA gives it, by which its table is found. arch: 90 for sm_90.

    clock: clocks a second. rates: see ProductRates; sustained: the share of them that long products reach. memory,
    cache: bytes a second that are reached, of memory and of the second-level cache.
    """

    name: str
    cuda: str
    arch: int
    multiprocessors: int
    clock: float
    rates: ProductRates
    sustained: float
    memory: float
    cache: float

    @property
    def multiprocessor(self) -> Multiprocessor:
        return MULTIPROCESSORS[self.arch]

    def flops(self, precision: Product) -> float:
        """FLOPs a second that products of a precision reach."""
        return self.multiprocessors * self.clock * self.sustained * getattr(self.rates, precision)


# "H100 Tensor Core GPU Architecture" (white paper), "Throughput": 1024 dense FMAs of half precision a clock and matrix
# unit of four, half of them of tf32; 128 lanes of float32; 67 TFLOPS of float64 by matrix units at 1.98 GHz.
HOPPER = ProductRates(half=4096, tf32=2048, ieee=256, fp64=256)
KNOWN = (
    KnownGpu(
        "b200", "NVIDIA B200", 100,
        multiprocessors=148,  # assumed: what others found CUDA to say; NVIDIA's data sheets give none
        clock=1.85e9,  # assumed: with it, the data sheets' 2.25 PFLOPS are 8192 FLOPs a clock
        # DGX B200 and HGX B200 data sheets: 2.25 and 1.1 PFLOPS, 75 and 37 TFLOPS
        rates=ProductRates(half=8192, tf32=4096, ieee=256, fp64=128),
        sustained=0.83,  # assumed: as of H200
        memory=7.2e12,  # assumed: 90 % of the data sheet's 8 TB/s
        cache=10e12,  # assumed
    ),
    KnownGpu(
        "h200", "NVIDIA H200", 90,
        multiprocessors=132,  # H100 white paper, H100 SXM5, whose chip it is
        clock=1.755e9,  # assumed, under load; the H200 data sheet's rates are of 1.83 GHz, its highest clock is 1.98
        rates=HOPPER,
        sustained=0.833,  # assumed: 790 TFLOPS of half precision, 80 % of the data sheet's 989, for want of power
        memory=4.3e12,  # assumed: 90 % of the data sheet's 4.8 TB/s
        cache=5.5e12,  # assumed: what others measured of an H100
    ),
    KnownGpu(
        "h100", "NVIDIA H100 80GB HBM3", 90,
        multiprocessors=132,  # H100 white paper, H100 SXM5
        clock=1.755e9,  # assumed, as of H200
        rates=HOPPER,
        sustained=0.833,  # assumed, as of H200
        memory=3.0e12,  # assumed: 90 % of the data sheet's 3.35 TB/s
        cache=5.5e12,  # assumed, as of H200
    ),
    KnownGpu(
        "a100", "NVIDIA A100-SXM4-80GB", 80,
        multiprocessors=108,  # A100 white paper
        clock=1.41e9,  # A100 white paper, "GPU Boost Clock"
        rates=ProductRates(half=2048, tf32=1024, ieee=128, fp64=128),  # A100 white paper: 312, 156, 19.5, 19.5 TFLOPS
        sustained=1.0,  # assumed: its power suffices
        memory=1.75e12,  # assumed: 86 % of the data sheet's 2.04 TB/s
        cache=4.5e12,  # assumed: of the 5120 bytes a clock that the white paper gives for reading, 62 %
    ),
    KnownGpu(
        "l40s", "NVIDIA L40S", 89,
        multiprocessors=142,  # L40S data sheet: 18176 CUDA cores, 128 each
        clock=2.52e9,  # assumed: with it, the data sheet's 91.6 TFLOPS of float32 are 256 FLOPs a clock
        # L40S data sheet: 362, 183 and 91.6 TFLOPS; Ada white paper: 2 lanes of float64
        rates=ProductRates(half=1024, tf32=512, ieee=256, fp64=4),
        sustained=0.8,  # assumed: 350 W
        memory=0.78e12,  # assumed: 90 % of the data sheet's 864 GB/s
        cache=4.0e12,  # assumed
    ),
    KnownGpu(
        "rtx-4090", "NVIDIA GeForce RTX 4090", 89,
        multiprocessors=128,  # Ada white paper
        clock=2.52e9,  # Ada white paper, "GPU Boost Clock"
        # Ada white paper: 165.2 TFLOPS of half precision with float32 accumulation, half of what it has without; 82.6
        rates=ProductRates(half=512, tf32=256, ieee=256, fp64=4),
        sustained=1.0,  # assumed: its power suffices at half the rate
        memory=0.91e12,  # assumed: 90 % of the white paper's 1008 GB/s
        cache=4.0e12,  # assumed
    ),
    KnownGpu(
        "rtx-3090", "NVIDIA GeForce RTX 3090", 86,
        multiprocessors=82,  # GA102 white paper
        clock=1.695e9,  # GA102 white paper, "GPU Boost Clock"
        # GA102 white paper: 71 TFLOPS of half precision with float32 accumulation, half of what it has without; 35.6
        rates=ProductRates(half=512, tf32=256, ieee=256, fp64=4),
        sustained=1.0,  # assumed: its power suffices at half the rate
        memory=0.84e12,  # assumed: 90 % of the white paper's 936 GB/s
        cache=2.0e12,  # assumed
    ),
)  # fmt: skip


def named(text: str) -> KnownGpu:
    """The GPU that `text` names, in either of its names and in letters of either case.

    Raises ValueError, which lists what there is.
    """
    for gpu in KNOWN:
        if text.lower() in (gpu.name, gpu.cuda.lower()):
            return gpu
    raise ValueError(f"{text!r} is none of {', '.join(gpu.name for gpu in KNOWN)}")


def stand_in(cuda: str, arch: int) -> KnownGpu:
    """The GPU of a name that CUDA gives, with numbers of it; or, if it is not known here, those of one with the same
    multiprocessors, or else of the nearest older architecture.
    """
    for gpu in KNOWN:
        if gpu.cuda == cuda and gpu.arch == arch:
            return gpu
    alike = [gpu for gpu in KNOWN if gpu.arch == arch]
    alike += [gpu for gpu in KNOWN if gpu.multiprocessor == MULTIPROCESSORS.get(arch)]
    oldest = min(KNOWN, key=lambda gpu: gpu.arch)
    older = [gpu for gpu in KNOWN if gpu.arch <= arch]
    found = alike[0] if alike else max(older, key=lambda gpu: gpu.arch, default=oldest)
    return found._replace(name=cuda, cuda=cuda, arch=arch if arch in MULTIPROCESSORS else found.arch)


def capability_of(arch: str) -> int:
    """90 of "sm_90", "sm_90a" and "90". Raises ValueError, which names the choices, for an architecture that is not
    known here, and says which one a GPU's name stands for.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)a?", arch)
    if not match or int(match[1]) not in SHARED_LIMITS:
        known = ", ".join(f"sm_{c}" for c in SHARED_LIMITS)
        try:
            meant = f". Did you mean 'sm_{named(arch).arch}'?"
        except ValueError:
            meant = ""
        raise ValueError(f"arch={arch!r} is not known here: use one of {known}{meant}")
    return int(match[1])
