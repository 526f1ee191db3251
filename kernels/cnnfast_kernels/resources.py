"""What the compiled kernels take of a GPU: registers, shared memory and instructions, read from machine code that was
compiled ahead of time. Pure Python: imports neither torch nor triton.

A row is of a kernel, a form of its loop, a tile, a class of epilogues and an architecture, as one version of triton
compiles it. They lie in resources/, a file for each version of triton and architecture; aot/records.py writes them, and
CI compares.
"""

from __future__ import annotations

import csv
import functools
import re
from math import log2
from pathlib import Path
from typing import Literal, NamedTuple

EpilogueClass = Literal["plain", "moments", "norm"]

FOLDER = Path(__file__).parent / "resources"
# Whose rows the model reads: that of the CUDA builds of torch. Those of others are there to be compared with.
TRITON = "3.7"
# Whose rows stand for those of an architecture that has none: that with the same matrix unit.
STANDS_FOR = {86: 80, 87: 80, 103: 100, 120: 89}
MOST_REGISTERS = 255
LANES = 32


class ResourceKey(NamedTuple):
    """kernel: the jit function's name. form: of the main loop, see `form_of` of the kernels' tile modules (tiling.py,
    tma/tiles.py, gather/depthwise/tiles.py): "1x1", "taps", "masked", "flat", "phases", ... tile: as str() of the tile
    writes it, without its split. epilogue: "norm" is the heaviest, with norm, residual and activation. dtype: "half",
    "tf32", "ieee" or "fp64". arch: 90 for sm_90.
    """

    kernel: str
    form: str
    tile: str
    epilogue: EpilogueClass
    dtype: str
    arch: int


class Resources(NamedTuple):
    """registers: of a thread. shared_bytes: of a program. loop_instructions: that a warp issues in one k-step.
    other_instructions: that it issues outside of the loop. exact: whether they were read from this very kernel's
    machine code; where no row is, they are estimated from the nearest row. spill_bytes: of a thread.

    A k-step of a depthwise kernel is one turn of its innermost loop, and what has no loop has all its instructions
    outside.
    """

    registers: int
    shared_bytes: int
    loop_instructions: float
    other_instructions: float
    exact: bool = True
    spill_bytes: int = 0


class TileShape(NamedTuple):
    """What the name of a tile says: rows x columns of sums, the depth of a k-step; box: of a tile of pixels, (images,
    rows, columns).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    box: tuple[int, int, int] = (1, 1, 1)

    @property
    def sums(self) -> float:
        """Of a warp."""
        return self.rows * self.columns / self.warps

    @property
    def loaded(self) -> float:
        """Elements that a warp loads in a k-step."""
        return (self.rows + self.columns) * self.depth / self.warps

    def staged(self, key: ResourceKey) -> int:
        """Elements that wait in shared memory: those of all stages where wgmma or tcgen05 reads them there, else of all
        but the one that is being multiplied.
        """
        in_place = key.arch >= 90 and key.dtype == "half"
        return (self.rows + self.columns) * self.depth * (self.stages if in_place else max(1, self.stages - 1))


GATHERED = re.compile(r"(\d+)x(\d+)x(\d+) w(\d+) s(\d+)")
BOXED = re.compile(r"(\d+)x(\d+)x(\d+) pixels k(\d+) c(\d+) w(\d+) s(\d+)")
STRIPS = re.compile(r"(\d+)x(\d+) (\d+) rows w(\d+)")


@functools.lru_cache(4096)
def shape_of(kernel: str, tile: str) -> TileShape | None:
    """What a tile's name says, given the kernel that it is of; None for a name that no tile has."""
    if match := GATHERED.fullmatch(tile):
        rows, columns, depth, warps, stages = map(int, match.groups())
        return TileShape(rows, columns, depth, warps, stages)
    if match := BOXED.fullmatch(tile):
        n, h, w, filters, channels, warps, stages = map(int, match.groups())
        pixels = n * h * w
        product = (filters, channels, pixels)
        if "fprop" in kernel:
            product = (pixels, filters, channels)
        elif "dgrad" in kernel:
            product = (pixels, channels, filters)
        return TileShape(*product, warps, stages, (n, h, w))
    if match := STRIPS.fullmatch(tile):
        strips, channels, rows, warps = map(int, match.groups())
        return TileShape(strips * rows, channels, 1, warps, 1)
    return None


COLUMNS = (
    *("kernel", "form", "tile", "epilogue", "dtype"),
    *("registers", "shared_bytes", "spill_bytes", "loop_instructions", "other_instructions"),
)


def file_of(arch: int, triton: str = TRITON) -> Path:
    """Where the rows of sm_`arch` are that a version of triton, as "3.7", compiled; the file need not be there."""
    return FOLDER / f"triton-{triton}" / f"sm_{arch}.csv"


@functools.cache
def rows_of(arch: int, triton: str = TRITON) -> dict[ResourceKey, Resources]:
    """All rows of sm_`arch`, none if it has no file."""
    file = file_of(arch, triton)
    return read(file, arch) if file.exists() else {}


def read(file: Path, arch: int) -> dict[ResourceKey, Resources]:
    """The rows of a file, which holds those of sm_`arch`."""
    found: dict[ResourceKey, Resources] = {}
    with file.open(newline="") as opened:
        for kernel, form, tile, epilogue, dtype, registers, shared, spills, loop, others in [*csv.reader(opened)][1:]:
            key = ResourceKey(kernel, form, tile, epilogue, dtype, arch)  # type: ignore[arg-type]
            found[key] = Resources(int(registers), int(shared), float(loop), float(others), spill_bytes=int(spills))
    return found


def write(file: Path, rows: dict[ResourceKey, Resources]) -> None:
    """Replaces a file by `rows`, all of one architecture, in the order of their keys."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key, r in sorted(rows.items()):
            numbers = (
                r.registers,
                r.shared_bytes,
                r.spill_bytes,
                f"{r.loop_instructions:g}",
                f"{r.other_instructions:g}",
            )
            writer.writerow((*key[:5], *numbers))


@functools.lru_cache(4096)
def resources_of(key: ResourceKey) -> Resources:
    """The row of `key`, or where there is none an estimate from the nearest rows, of which `exact` is False. It never
    raises.
    """
    rows = rows_of(key.arch)
    if rows or key.arch not in STANDS_FOR:
        return rows.get(key) or estimated(key, rows)
    return resources_of(key._replace(arch=STANDS_FOR[key.arch]))._replace(exact=False)


def estimated(key: ResourceKey, rows: dict[ResourceKey, Resources]) -> Resources:
    """What a kernel takes, from the nearest of `rows`.

    The loop and the shared memory follow from the row with the nearest loop, whatever its epilogue: instructions of a
    k-step as the elements that a warp loads, shared memory as those that all stages hold. Registers and the other
    instructions follow from the row with the nearest epilogue: a register more for each sum more that a thread has,
    instructions beyond FIXED as the sums of a warp.
    """
    own = shape_of(key.kernel, key.tile)
    known = [
        (near, shape, row)
        for near, row in rows.items()
        if near.kernel == key.kernel and (shape := shape_of(near.kernel, near.tile)) is not None
    ]
    if own is None or not known:
        return UNKNOWN

    def apart(shape: TileShape) -> tuple[float, ...]:
        sums, depth = abs(log2(shape.sums / own.sums)), abs(log2(shape.depth / own.depth))
        box = sum(a != b for a, b in zip(axes(shape), axes(own), strict=True))
        rows = abs(log2(shape.rows / own.rows))
        return shape.warps != own.warps, sums, rows, depth, box, abs(shape.stages - own.stages)

    unrolled = key.kernel.startswith("depthwise_")

    def unlike(near: ResourceKey) -> int:
        """How far apart two forms are: windows of another size, masks in each step, elements loaded one at a time."""
        return int(near.form != key.form) if unrolled else abs(KINDS.get(near.form, 0) - KINDS.get(key.form, 0))

    def loop_distance(near: ResourceKey, shape: TileShape) -> tuple[float, ...]:
        kinds = near.dtype != key.dtype, unlike(near), near.form != key.form
        return *kinds, *apart(shape), near.epilogue != key.epilogue

    def end_distance(near: ResourceKey, shape: TileShape) -> tuple[float, ...]:
        kinds = near.dtype != key.dtype, unlike(near), near.epilogue != key.epilogue
        return *kinds, *apart(shape), near.form != key.form

    loop_key, loop_shape, loop = min(known, key=lambda found: loop_distance(*found[:2]))
    _, end_shape, end = min(known, key=lambda found: end_distance(*found[:2]))
    registers = end.registers + round((own.sums - end_shape.sums) / LANES)
    others = end.other_instructions
    return Resources(
        max(32, min(MOST_REGISTERS, registers)),
        round(loop.shared_bytes * own.staged(key) / loop_shape.staged(loop_key)),
        loop.loop_instructions * own.loaded / loop_shape.loaded,
        others + max(0, others - FIXED) * (own.sums / end_shape.sums - 1),
        exact=False,
        spill_bytes=end.spill_bytes if registers >= end.registers else 0,
    )


def axes(shape: TileShape) -> tuple[bool, bool, bool]:
    """Along which axes of the pixels a box has several."""
    images, rows, columns = shape.box
    return images > 1, rows > 1, columns > 1


# The forms whose loops are heavier than that of "1x1", "taps" and "phases": masks in each step, single elements.
KINDS = {"masked": 1, "flat": 1, "narrow": 2, "apart": 2}
# Instructions outside of the loop that a tile of no sums would have: what kernels without an epilogue tend to.
FIXED = 300
# Of a kernel that no row is of: what most take of those that there are rows of.
UNKNOWN = Resources(168, 0, 150.0, 1500.0, exact=False)
