"""Tensors [N, C, *spatial] of any layout as planes of rows of channels: (n, l, c) lies at n * stride_n + l * stride_l +
c * stride_c.

channels_last collapses to a single plane of N * H * W rows with adjacent channels; NCHW is N planes of adjacent rows.
One kernel serves both, because it is told which axis is adjacent: that stride is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, no_type_check, overload

import torch
import triton
import triton.language as tl

from . import launch
from .layout import Laid, Layout, is_channels_last, result_format
from .tiling import BUSY_PROGRAMS, cdiv


@dataclass(frozen=True, slots=True)
class PlaneTile:
    """Rows and channels of one program."""

    BLOCK_L: int
    BLOCK_C: int
    num_warps: int = 4

    def __str__(self) -> str:
        return f"{self.BLOCK_L}x{self.BLOCK_C} w{self.num_warps}"


class PlaneStrides(NamedTuple):
    """An operand's strides in units of `Planes.ALIGN` elements, as kernels take them: from plane to plane, row to row,
    channel to channel. None where rows or channels are adjacent; all are None of an operand that is absent.
    """

    n: int | None
    l: int | None
    c: int | None


ABSENT = PlaneStrides(None, None, None)


class PlaneGeometry(NamedTuple):
    """What a kernel over planes is compiled for: its constexpr argument `g`.

    C channels; strides are in units of ALIGN elements, L in units of L_ALIGN rows; a program's tile has BLOCK_L rows
    and BLOCK_C channels. N and L are no part of it: another batch or image compiles nothing.
    """

    C: int
    ALIGN: int
    L_ALIGN: int
    BLOCK_L: int
    BLOCK_C: int


@dataclass(frozen=True, slots=True)
class Planes:
    """N planes of L rows of C channels, the strides of each operand, and the tile of a program."""

    N: int
    L: int
    C: int
    strides: tuple[PlaneStrides, ...]
    ALIGN: int
    L_ALIGN: int
    tile: PlaneTile

    @property
    def rows(self) -> int:
        return self.N * self.L

    @property
    def tiles_l(self) -> int:
        """Tiles along the rows of one plane; no tile spans two planes."""
        return cdiv(self.L, self.tile.BLOCK_L)

    @property
    def tiles(self) -> int:
        """Tiles along the rows of all planes."""
        return self.N * self.tiles_l

    @property
    def grid(self) -> tuple[int]:
        return (self.tiles * cdiv(self.C, self.tile.BLOCK_C),)

    @property
    def units(self) -> int:
        """L as kernels take it: in units of L_ALIGN."""
        return self.L // self.L_ALIGN

    @property
    def constants(self) -> dict[str, Any]:
        """What every launch over these planes is given by keyword."""
        t = self.tile
        g = PlaneGeometry(self.C, self.ALIGN, self.L_ALIGN, t.BLOCK_L, t.BLOCK_C)
        return {"tile": t, "g": g, "num_warps": t.num_warps}


def choose_plane_tile(
    N: int, L: int, C: int, rows_adjacent: bool, dtype: torch.dtype, least_rows: int = 16
) -> PlaneTile:
    """A tile of 4096 elements, 32 for each thread, or of 1024 in float64 and where larger ones leave multiprocessors
    idle. It is 64 channels wide, or, where rows are adjacent, 256 rows high; and has least_rows, 16 or 32, or more.

    For each C there are two tiles with adjacent channels and six with adjacent rows: other N, H and W compile no more
    kernels than that.
    """
    tile = None
    for elements in (1024,) if dtype == torch.float64 else (4096, 1024):
        if rows_adjacent:
            BLOCK_L = 256 if L > 128 else 64 if L > 16 else least_rows
            BLOCK_C = min(elements // BLOCK_L, triton.next_power_of_2(C))
        else:
            BLOCK_C = min(64, elements // least_rows, triton.next_power_of_2(C))
            BLOCK_L = elements // BLOCK_C
        tile = PlaneTile(BLOCK_L, BLOCK_C)
        if N * cdiv(L, BLOCK_L) * cdiv(C, BLOCK_C) >= 2 * BUSY_PROGRAMS:
            break
    assert tile is not None
    return tile


@launch.planned
def spatial_stride(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """The stride of all spatial axes merged into one, or None if they do not merge. Strides of axes of one element are
    ignored.
    """
    if 0 in shape:
        return 0
    axes = [(size, step) for size, step in zip(shape[2:], stride[2:], strict=True) if size != 1]
    merge = all(outer == size * inner for (_, outer), (size, inner) in pairwise(axes))
    return None if not merge else axes[-1][1] if axes else 0


@launch.planned
def common_planes(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...], dtype: torch.dtype, least_rows: int = 16
) -> Planes:
    """Operands of one shape with these strides (None: absent) as planes, with the tile for their dtype, of least_rows
    or more. Their spatial axes must merge.
    """
    N, C = shape[:2]
    L = 1
    for size in shape[2:]:
        L *= size
    present = [(s[0], spatial_stride(shape, s), s[1]) for s in strides if s is not None]
    if L == 1:  # the images are the rows of one plane
        N, L, present = 1, N, [(0, n, c) for n, _, c in present]
    elif all(N == 1 or n == L * l for n, l, _ in present):
        N, L, present = 1, N * L, [(0, l, c) for _, l, c in present]
    present = [(n if N > 1 else 0, l if L > 1 else 0, c if C > 1 else 0) for n, l, c in present]

    apart = [s for each in present for s in (each[0], *(s for s in each[1:] if s != 1))]
    rows_adjacent = any(l == 1 for _, l, _ in present)
    ALIGN = next(a for a in (8, 4, 2, 1) if all(s % a == 0 for s in apart))
    # masks along an adjacent axis are constant over a vector only if its extent is known to be a multiple
    L_ALIGN = next(a for a in (8, 4, 2, 1) if L % a == 0) if rows_adjacent else 1
    each = iter(
        PlaneStrides(n // ALIGN, None if l == 1 else l // ALIGN, None if c == 1 else c // ALIGN) for n, l, c in present
    )
    units = tuple(ABSENT if s is None else next(each) for s in strides)
    tile = choose_plane_tile(N, L, C, rows_adjacent and all(c != 1 for _, _, c in present), dtype, least_rows)
    return Planes(N, L, C, units, ALIGN, L_ALIGN, tile)


def dense_format(t: Laid) -> torch.memory_format:
    """The memory format of a result like `t` [N, C, *spatial], as PyTorch suggests it."""
    if t.dim() == 5:  # without its depth, an image that is channels_last if the volume is
        shape, strides = ((*of[:2], *of[3:]) for of in (t.shape, t.stride()))
        image = Layout(shape, strides, t.dtype)
        last = 0 not in t.shape and is_channels_last(image)
        return torch.channels_last_3d if last else torch.contiguous_format
    return result_format(t)


@overload
def mergeable(t: torch.Tensor) -> torch.Tensor: ...
@overload
def mergeable(t: torch.Tensor | None) -> torch.Tensor | None: ...
def mergeable(t: torch.Tensor | None) -> torch.Tensor | None:
    """`t`, or a dense copy of it where its spatial axes do not merge into one (a slice along W, a transposed image)."""
    if t is None or t.is_contiguous() or spatial_stride(t.shape, t.stride()) is not None:
        return t
    last = {4: torch.channels_last, 5: torch.channels_last_3d} if t.stride(1) == 1 else {}
    return t.contiguous(memory_format=last.get(t.dim(), torch.contiguous_format))


@overload
def contiguous(*vectors: torch.Tensor) -> tuple[torch.Tensor, ...]: ...
@overload
def contiguous(*vectors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]: ...
def contiguous(*vectors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Vectors over channels as kernels read them: a slice or an expanded number is copied."""
    for v in vectors:
        if v is not None and not v.is_contiguous():
            return tuple(None if v is None else v.contiguous() for v in vectors)
    return vectors


class PlaneTensor(NamedTuple):
    """Inside a kernel, the pointer to an operand, None if it is absent, and its PlaneStrides in units of `align`
    elements.
    """

    ptr: tl.tensor
    stride_n: tl.tensor
    stride_l: tl.tensor
    stride_c: tl.tensor
    align: int


class TilePlace(NamedTuple):
    """Inside a kernel, the elements of its tile: plane n, rows l [BLOCK_L], channels c [BLOCK_C], which of these exist
    (mask: of rows and channels), the tile's number among the tiles of rows of all planes, and how many rows its plane
    has from its first on.
    """

    number: tl.tensor
    n: tl.tensor
    l: tl.tensor
    c: tl.tensor
    l_ok: tl.tensor
    c_ok: tl.tensor
    mask: tl.tensor
    rows: tl.tensor


@triton.jit
@no_type_check
def locate_tile(L, g: tl.constexpr):
    """The TilePlace of this program; L in units of g.L_ALIGN."""
    BLOCK_L: tl.constexpr = g.BLOCK_L
    BLOCK_C: tl.constexpr = g.BLOCK_C
    TILES_C: tl.constexpr = (g.C + BLOCK_C - 1) // BLOCK_C
    L = L * g.L_ALIGN
    pid = tl.program_id(0)
    tile = pid // TILES_C
    tiles_l = tl.cdiv(L, BLOCK_L)
    first = (tile % tiles_l).to(tl.int64) * BLOCK_L
    l = first + tl.arange(0, BLOCK_L)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    l_ok = l < L
    c_ok = c < g.C
    return TilePlace(tile, tile // tiles_l, l, c, l_ok, c_ok, l_ok[:, None] & c_ok[None, :], L - first)


@triton.jit
@no_type_check
def axis_offset(i, stride, ALIGN: tl.constexpr):
    """`stride` is None where elements are adjacent: then the compiler sees that, and loads vectors."""
    return i.to(tl.int64) if stride is None else i.to(tl.int64) * stride * ALIGN


@triton.jit
@no_type_check
def tile_pointers(t, at):
    """Pointers [BLOCK_L, BLOCK_C] into the PlaneTensor t."""
    rows = t.ptr + axis_offset(at.n, t.stride_n, t.align) + axis_offset(at.l, t.stride_l, t.align)
    return rows[:, None] + axis_offset(at.c, t.stride_c, t.align)[None, :]


@triton.jit
@no_type_check
def load_tile(t, at, ACC: tl.constexpr):
    """Elements [BLOCK_L, BLOCK_C] in the accumulator's dtype, zero where there are none."""
    return tl.load(tile_pointers(t, at), mask=at.mask, other=0.0).to(ACC)


@triton.jit
@no_type_check
def load_vector(ptr, c, c_ok, ACC: tl.constexpr):
    """A vector over channels, [BLOCK_C]."""
    return tl.load(ptr + c, mask=c_ok, other=0.0).to(ACC)
