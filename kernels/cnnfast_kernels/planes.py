"""Tensors [N, C, *spatial] of any layout as planes of rows of channels: (n, l, c) lies at n * stride_n + l * stride_l +
c * stride_c.

Channels last collapses to a single plane of N * H * W rows with adjacent channels; NCHW is N planes of adjacent rows.
One kernel serves both, because it is told which axis is adjacent: that stride is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, no_type_check

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


PlaneStrides = tuple[int | None, int | None, int | None]


@dataclass(frozen=True, slots=True)
class Planes:
    """N planes of L rows of C channels, and each operand's strides (n, l, c) in units of ALIGN elements: None where
    adjacent or absent.
    """

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
        t = self.tile
        aligned = {"C": self.C, "ALIGN": self.ALIGN, "L_ALIGN": self.L_ALIGN}
        return {"tile": t, "BLOCK_L": t.BLOCK_L, "BLOCK_C": t.BLOCK_C, "num_warps": t.num_warps, **aligned}


def choose_plane_tile(N: int, L: int, C: int, rows_adjacent: bool, dtype: torch.dtype) -> PlaneTile:
    """4096 elements (32 a thread), or 1024 where that leaves multiprocessors idle and in float64; 64 channels wide, or
    256 rows high.

    Two tiles for each C with adjacent channels, six with adjacent rows: other N, H, W compile no more than that.
    """
    tile = None
    for elements in (1024,) if dtype == torch.float64 else (4096, 1024):
        if rows_adjacent:
            BLOCK_L = 256 if L > 128 else 64 if L > 16 else 16
            BLOCK_C = min(elements // BLOCK_L, triton.next_power_of_2(C))
        else:
            BLOCK_C = min(64, triton.next_power_of_2(C))
            BLOCK_L = elements // BLOCK_C
        tile = PlaneTile(BLOCK_L, BLOCK_C)
        if N * cdiv(L, BLOCK_L) * cdiv(C, BLOCK_C) >= 2 * BUSY_PROGRAMS:
            break
    assert tile is not None
    return tile


@launch.planned
def spatial_stride(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """The stride of all spatial axes merged into one, or None if they do not merge. Axes of one element have no say."""
    if 0 in shape:
        return 0
    axes = [(size, step) for size, step in zip(shape[2:], stride[2:], strict=True) if size != 1]
    merge = all(outer == size * inner for (_, outer), (size, inner) in pairwise(axes))
    return None if not merge else axes[-1][1] if axes else 0


@launch.planned
def common_planes(shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...], dtype: torch.dtype) -> Planes:
    """Operands of one shape, with these strides (None: absent), as planes. Their spatial axes must merge; tiles suit
    `dtype`.
    """
    N, C = shape[:2]
    L = 1
    for size in shape[2:]:
        L *= size
    present = [(s[0], spatial_stride(shape, s), s[1]) for s in strides if s is not None]
    if L == 1:
        N, L, present = 1, N, [(0, n, c) for n, _, c in present]
    elif all(N == 1 or n == L * l for n, l, _ in present):
        N, L, present = 1, N * L, [(0, l, c) for _, l, c in present]
    present = [(n if N > 1 else 0, l if L > 1 else 0, c if C > 1 else 0) for n, l, c in present]

    apart = [s for each in present for s in (each[0], *(s for s in each[1:] if s != 1))]
    rows_adjacent = any(l == 1 for _, l, _ in present)
    ALIGN = next(a for a in (8, 4, 2, 1) if all(s % a == 0 for s in apart))
    # masks along an adjacent axis are constant over a vector only if its extent is known to be a multiple
    L_ALIGN = next(a for a in (8, 4, 2, 1) if L % a == 0) if rows_adjacent else 1
    each = iter((n // ALIGN, None if l == 1 else l // ALIGN, None if c == 1 else c // ALIGN) for n, l, c in present)
    units = tuple((None, None, None) if s is None else next(each) for s in strides)
    tile = choose_plane_tile(N, L, C, rows_adjacent and all(c != 1 for _, _, c in present), dtype)
    return Planes(N, L, C, units, ALIGN, L_ALIGN, tile)


def dense_format(t: Laid) -> torch.memory_format:
    """The memory format of a result like `t` [N, C, *spatial], as PyTorch suggests it."""
    if t.dim() == 5:
        image = Layout(*((*of[:2], *of[3:]) for of in (t.shape, t.stride())), t.dtype)
        last = 0 not in t.shape and is_channels_last(image)
        return torch.channels_last_3d if last else torch.contiguous_format
    return result_format(t)


def mergeable(t: torch.Tensor | None) -> torch.Tensor | None:
    """`t`, or a dense copy of it where its spatial axes do not merge into one (a slice along W, a transposed image)."""
    if t is None or t.is_contiguous() or spatial_stride(t.shape, t.stride()) is not None:
        return t
    last = {4: torch.channels_last, 5: torch.channels_last_3d} if t.stride(1) == 1 else {}
    return t.contiguous(memory_format=last.get(t.dim(), torch.contiguous_format))


@triton.jit
@no_type_check
def locate_tile(L, C: tl.constexpr, L_ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's index among tiles of rows, plane n, rows l [BLOCK_L], channels c [BLOCK_C], and which of them
    exist.
    """
    L = L * L_ALIGN
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile = pid // TILES_C
    tiles_l = tl.cdiv(L, BLOCK_L)
    l = (tile % tiles_l).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    return tile, tile // tiles_l, l, c, l < L, c < C


@triton.jit
@no_type_check
def axis_offset(i, stride, ALIGN: tl.constexpr):
    """`stride` is None where elements are adjacent: then the compiler sees that, and loads vectors."""
    return i.to(tl.int64) if stride is None else i.to(tl.int64) * stride * ALIGN


@triton.jit
@no_type_check
def tile_pointers(ptr, stride_n, stride_l, stride_c, n, l, c, ALIGN: tl.constexpr):
    """Pointers [BLOCK_L, BLOCK_C]."""
    rows = ptr + axis_offset(n, stride_n, ALIGN) + axis_offset(l, stride_l, ALIGN)
    return rows[:, None] + axis_offset(c, stride_c, ALIGN)[None, :]


@triton.jit
@no_type_check
def load_tile(ptr, stride_n, stride_l, stride_c, n, l, c, mask, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """Elements [BLOCK_L, BLOCK_C] in the accumulator's dtype, zero where `mask` is false."""
    return tl.load(tile_pointers(ptr, stride_n, stride_l, stride_c, n, l, c, ALIGN), mask=mask, other=0.0).to(ACC)


@triton.jit
@no_type_check
def load_channels(ptr, c, c_ok, ACC: tl.constexpr):
    """A vector over channels, [BLOCK_C]."""
    return tl.load(ptr + c, mask=c_ok, other=0.0).to(ACC)
