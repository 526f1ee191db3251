"""The tile of a result that one program computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import triton
import triton.language as tl

from ..tiling import cdiv
from .sources import PixelBox, Pixels


@dataclass(frozen=True, slots=True)
class PixelTile:
    """The pixels of a result that one program computes."""

    BLOCK_P: int
    BLOCK_Q: int

    def count(self, P: int, Q: int) -> int:
        """How many of them a result has."""
        return cdiv(P, self.BLOCK_P) * cdiv(Q, self.BLOCK_Q)

    def __str__(self) -> str:
        return f"{self.BLOCK_P}x{self.BLOCK_Q}"


# Higher than one row: the pixels that a turned tile needs lie close together then. Two pixels a thread, by what the
# compiler says and no measured time: four take a sixth fewer instructions each, but twice the registers, 128 a thread,
# which some compilers exceed; with two, twice as many threads wait for memory at once.
TILE = PixelTile(8, 32)
NUM_WARPS = 4


@triton.jit
@no_type_check
def tile_pixels(tile, P, Q, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The pixels of a tile of a result, the tiles counted row by row."""
    lane = tl.arange(0, BLOCK_P * BLOCK_Q)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    top = tile // tiles_q * BLOCK_P
    left = tile % tiles_q * BLOCK_Q
    p = top + lane // BLOCK_Q
    q = left + lane % BLOCK_Q
    borders = PixelBox(
        left.to(tl.float32), top.to(tl.float32), (left + BLOCK_Q).to(tl.float32), (top + BLOCK_P).to(tl.float32)
    )
    return Pixels(p, q, (p < P) & (q < Q), P, Q, borders)
