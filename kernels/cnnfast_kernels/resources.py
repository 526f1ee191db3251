"""What the compiled kernels take of a GPU: registers, shared memory and instructions, read from machine code that was
compiled ahead of time. Pure Python: imports neither torch nor triton.

A row is of a kernel, a form of its loop, a tile, a class of epilogues and an architecture, as one version of triton
compiles it. aot/records.py writes them, and CI compares.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

EpilogueClass = Literal["plain", "moments", "norm"]


class ResourceKey(NamedTuple):
    """kernel: the jit function's name. form: of the main loop, see `form_of` of the kernels' tile modules: "1x1",
    "taps", "masked", "flat", "phases", ... tile: as str() of the tile writes it, without its split. epilogue: "norm" is
    the heaviest, with norm, residual and activation. dtype: "half", "tf32", "ieee" or "fp64". arch: 90 for sm_90.
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
    machine code; where no row is, they are estimated from the nearest row.
    """

    registers: int
    shared_bytes: int
    loop_instructions: float
    other_instructions: float
    exact: bool = True


def resources_of(key: ResourceKey) -> Resources: ...
