"""What a kernel with a tile costs on a GPU, and what limits it: a model. Pure Python: imports neither torch nor triton.

The time of a launch is that of whichever takes longest: the products of the tensor cores, the issue of instructions,
the loads from the second-level cache, those from shared memory, the bytes of memory, or, where too few programs live on
a multiprocessor to hide it, the latency of their waves. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .gpus import KnownGpu
from .resources import Resources
from .tiling import Precision

Limiter = Literal["tensor", "issue", "l2", "shared", "memory", "latency"]


class Work(NamedTuple):
    """What an operation does with a tile.

    programs: of the launch. warps: of a program. steps: k-steps of all programs together. product: (rows, columns,
    depth) of the matrix product of one step. loaded: bytes that a program loads in one step. outside: bytes that a
    program loads and stores outside of its loop. memory: bytes that the operation moves if each tensor is read or
    written once. flops: of the operation itself, without what a tile computes in vain. stages: of the loop's pipeline.
    through_registers: whether the product's operands are read from shared memory by each warp, as before sm_90 and by
    operands that pass through registers. launches: of further kernels, each of which takes `further` bytes.
    """

    programs: int
    warps: int
    steps: float
    product: tuple[int, int, int]
    precision: Precision
    loaded: int
    outside: int
    memory: int
    flops: int
    stages: int
    through_registers: bool = True
    launches: int = 0
    further: int = 0


class Cost(NamedTuple):
    """parts: seconds of each Limiter, and `seconds` the longest of them with what further launches add. residents:
    programs that live on a multiprocessor at once. waves: in which the programs run. tail: the share of the last wave's
    places that is empty. intensity: FLOPs for each byte from the second-level cache.
    """

    seconds: float
    limiter: Limiter
    parts: dict[Limiter, float]
    residents: int
    waves: int
    tail: float
    intensity: float


def cost(work: Work, resources: Resources, gpu: KnownGpu) -> Cost: ...


def roofline(work: Work, gpu: KnownGpu) -> float:
    """Seconds if the operation only multiplied, or only moved each of its tensors once: whichever is longer."""
    ...
