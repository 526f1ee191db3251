"""What a kernel with a tile costs on a GPU, and what limits it: a model. Pure Python: imports neither torch nor triton.

The time of a launch is that of whichever takes longest: the products of the matrix units, the issue of instructions,
the loads from the second-level cache, those from shared memory, the bytes of memory, or, where too few programs live on
a multiprocessor to hide it, the latency of their waves. Nothing here was measured on a GPU.

What a multiprocessor does alone (products, issue, shared memory) takes as long as on the one that runs the most
programs. The second-level cache and the memory serve all at once. A wave is as long as one program that has its share
of both to itself: it waits for its first load, does its steps, of which each waits for the load that was begun
stages - 1 steps before, unless the first-level cache has it, and its epilogue, one after the other. Programs that live
there beside it fill its waits.
"""

from __future__ import annotations

from math import inf
from typing import Literal, NamedTuple

from .gpus import CACHE_CLOCK, RESERVED, SCHEDULERS, SHARED_CLOCK, KnownGpu
from .resources import Resources
from .tiling import ELEMENT_BYTES, Precision, cdiv

Limiter = Literal["tensor", "issue", "l2", "shared", "memory", "latency"]

# Seconds from a load's issue until its bytes are there, while many others load: assumed.
LATENCY = 0.7e-6
# Seconds that one more launch adds in a graph of launches: assumed.
LAUNCH = 2e-6
# Clocks from one instruction of a warp to its next, where no other warp fills the gap: every other instruction is taken
# to need the result before it, which is there after 4 clocks (CUDA C++ Programming Guide, "Multiprocessor Level").
GAP = 2
# Rows and columns of a product that one instruction of a warp computes before sm_90, or of operands in registers.
WARP_ROWS, WARP_COLUMNS = 16, 16
# Rows of a product for which one instruction reads the second operand from shared memory again, and the most columns
# for which it reads the first: wgmma of sm_90 and tcgen05 of sm_100 and sm_103, by a tenth of the architecture.
OPERAND_ROWS = {9: 64, 10: 128}
OPERAND_COLUMNS = 256
# How much longer than all else latency takes where it is said to limit: a little is always exposed.
EXPOSED = 1.1
# Registers are given to warps in units, and warps to a program by fours, one for each scheduler: the CUDA Occupancy
# Calculator's allocation unit and warp allocation granularity.
REGISTER_UNIT = 256


class TileWork(NamedTuple):
    """What an operation does with a tile: its main launch, and what further ones take.

    programs: of the launch. warps: of a program. steps: of the main loop, of all programs together. product: (rows,
    columns, depth) of the matrix product of one step. loaded: bytes that the loops of all programs load, without those
    that masks or a tensor's ends hide. cached: of these, the bytes that the first-level cache has. outside: bytes that
    all programs load and store outside of their loops. moved: bytes that the launch moves between memory and the GPU.
    memory: bytes that the operation moves if each of its tensors is read or written once, and nothing else. flops: of
    the operation itself, without what a tile computes in vain. stages: of the loop's pipeline; 0: its loads go to
    registers, not through shared memory. through_registers: whether warps read the product's operands from shared
    memory themselves, which all do before sm_90. launches: of further kernels, which together move `further` bytes.
    """

    programs: int
    warps: int
    steps: int
    product: tuple[int, int, int]
    precision: Precision
    loaded: int
    outside: int
    moved: int
    memory: int
    flops: int
    stages: int
    through_registers: bool = True
    cached: int = 0
    launches: int = 0
    further: int = 0

    @property
    def fetched(self) -> int:
        """Bytes between the multiprocessors and the second-level cache."""
        return self.loaded - self.cached + self.outside


PARTS: tuple[Limiter, ...] = ("tensor", "issue", "l2", "shared", "memory", "latency")


class TileCost(NamedTuple):
    """parts: seconds of each Limiter. seconds: the longest of them, and what further launches add; infinite where not
    one program fits on a multiprocessor. limiter: the longest part, but for a latency that is longest by less than a
    tenth. residents: programs that live on a multiprocessor at once. waves: in which the
    programs run. tail: the share of the last wave's places that is empty. intensity: FLOPs for each byte that the loops
    load from the second-level cache.
    """

    seconds: float
    limiter: Limiter
    parts: dict[Limiter, float]
    residents: int
    waves: int
    tail: float
    intensity: float


def residents(work: TileWork, resources: Resources, gpu: KnownGpu) -> int:
    """Programs that live on a multiprocessor at once; 0 where not one does."""
    m = gpu.multiprocessor
    by_warp = cdiv(resources.registers * 32, REGISTER_UNIT) * REGISTER_UNIT
    warps = m.registers // by_warp // SCHEDULERS * SCHEDULERS
    taken = cdiv(work.warps, SCHEDULERS) * SCHEDULERS
    return min(
        m.shared // (resources.shared_bytes + RESERVED),
        warps // taken,
        m.warps // work.warps,
        m.programs,
    )


def warp_grid(rows: int, columns: int, warps: int) -> tuple[int, int]:
    """How Triton lays warps over the rows and columns of a product before sm_90: by twos along the longer side."""
    down, across = 1, 1
    while down * across < warps:
        longer = rows // WARP_ROWS // down >= columns // WARP_COLUMNS // across
        if longer and down < rows // WARP_ROWS:
            down *= 2
        else:
            across *= 2
    return down, across


def clocks_of_product(work: TileWork, gpu: KnownGpu) -> float:
    """Clocks of one step's products."""
    rows, columns, depth = work.product
    return 2 * rows * columns * depth / (getattr(gpu.rates, work.precision) * gpu.sustained)


def shared_bytes_of_step(work: TileWork, arch: int) -> int:
    """Bytes that pass shared memory in a step: what is loaded is written once, and read as often as the product's
    instructions do.
    """
    rows, columns, depth = work.product
    at_once = None if work.through_registers else OPERAND_ROWS.get(arch // 10)
    if work.stages == 0:
        return 0
    if at_once is None:
        down, across = warp_grid(rows, columns, work.warps)
        read = rows * across + columns * down
    else:
        read = rows * cdiv(columns, OPERAND_COLUMNS) + columns * cdiv(rows, at_once)
    return (rows + columns + read) * depth * ELEMENT_BYTES[work.precision]


def path(work: TileWork, resources: Resources, gpu: KnownGpu) -> float:
    """Seconds from the beginning of a program to its end, where it has its multiprocessor to itself and its share of
    the second-level cache and of the memory.
    """
    steps = work.steps / work.programs
    slots = max(work.warps / SCHEDULERS, GAP)  # clocks that an instruction of all warps takes
    busy = min(work.programs, gpu.multiprocessors)
    from_memory = work.moved / max(work.fetched, 1)
    a_byte = max(busy / gpu.cache, busy * from_memory / gpu.memory, 1 / (CACHE_CLOCK * gpu.clock))
    clocks = max(
        clocks_of_product(work, gpu),
        resources.loop_instructions * slots,
        shared_bytes_of_step(work, gpu.arch) / SHARED_CLOCK,
    )
    loop = max(steps * clocks / gpu.clock, (work.loaded - work.cached) / work.programs * a_byte)
    step = loop / steps if steps else 0.0
    late = LATENCY if work.stages <= 1 else max(LATENCY / (work.stages - 1) - step, 0.0)
    waits = LATENCY + max(steps * (1 - work.cached / max(work.loaded, 1)) - 1, 0.0) * late
    return loop + waits + resources.other_instructions * slots / gpu.clock + work.outside / work.programs * a_byte


def cost(work: TileWork, resources: Resources, gpu: KnownGpu) -> TileCost:
    """What the work costs with a kernel that takes these resources."""
    living, programs = residents(work, resources, gpu), work.programs
    intensity = work.flops / max(work.loaded - work.cached, 1)
    if programs == 0 or living == 0:
        seconds = inf if programs else 0.0
        return TileCost(seconds, "latency", dict.fromkeys(PARTS, seconds), living, 0, 0.0, intensity)
    places = gpu.multiprocessors * living
    waves = cdiv(programs, places)
    most = cdiv(programs, gpu.multiprocessors)  # programs of the multiprocessor that runs the most
    steps = work.steps / programs
    instructions = steps * resources.loop_instructions + resources.other_instructions
    # results are laid out anew in shared memory before they are stored; what is loaded past it meets the first-level
    # cache, which is the same memory
    beside = 2 * work.outside if work.stages else work.loaded
    shared = steps * shared_bytes_of_step(work, gpu.arch) + beside / programs
    fetched = work.fetched / programs
    parts: dict[Limiter, float] = {
        "tensor": most * steps * clocks_of_product(work, gpu) / gpu.clock,
        "issue": most * work.warps * instructions / min(SCHEDULERS, living * work.warps) / gpu.clock,
        "l2": max(programs * fetched / gpu.cache, most * fetched / CACHE_CLOCK / gpu.clock),
        "shared": most * shared / SHARED_CLOCK / gpu.clock,
        "memory": work.moved / gpu.memory,
        "latency": waves * path(work, resources, gpu),
    }
    limiter = max(parts, key=lambda part: parts[part] / (EXPOSED if part == "latency" else 1))
    seconds = max(parts.values()) + work.launches * LAUNCH + work.further / gpu.memory
    return TileCost(seconds, limiter, parts, living, waves, 1 - programs / (waves * places), intensity)


def roofline(work: TileWork, gpu: KnownGpu) -> float:
    """Seconds if the operation only multiplied, or only moved each of its tensors once: whichever is longer."""
    return max(work.flops / gpu.flops(work.precision), work.memory / gpu.memory)
