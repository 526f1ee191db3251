"""What the pooling kernels that compute element by element share: the order of their programs, where windows and
pixels lie, and how the kernels are launched.

A program computes ROWS x VEC neighbouring elements in the order of its result's memory. VEC adjacent channels are one
vector access of one thread, and rows go to consecutive threads: along channels where these are adjacent, along w in
NCHW, where VEC is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl

from .. import launch
from ..indexing import channel_offset, pixel_offset
from ..layout import Laid, is_channels_last, strides_nhwc
from ..problem import PoolProblem
from ..tiling import MAX_REGISTERS, VECTOR_BYTES, cdiv

NUM_WARPS = 4
# All loads of a usual window are in flight at once. A loop over a larger window is unrolled in part, so that it does
# not take longer to compile.
MAX_UNROLL = 16
PART_UNROLL = 4


@dataclass(frozen=True, slots=True)
class PoolTile:
    """ROWS x VEC elements a program; CHANNELS_FAST: rows follow each other along channels, else along w."""

    ROWS: int
    VEC: int
    CHANNELS_FAST: bool

    def __str__(self) -> str:
        return f"{self.ROWS}x{self.VEC} {'NHWC' if self.CHANNELS_FAST else 'NCHW'}"


class PoolLayouts(NamedTuple):
    """The tensors whose strides a kernel takes, in the order of its parameters; the last of them is its result. None:
    the kernel has no such tensor.
    """

    x: Laid | None = None
    dy: Laid | None = None
    taps: Laid | None = None
    y: Laid | None = None
    dx: Laid | None = None


class PoolAlignments(NamedTuple):
    """The alignment of each one's strides in elements: a kernel's constexpr argument `align`."""

    x: int = 1
    dy: int = 1
    taps: int = 1
    y: int = 1
    dx: int = 1


RUNTIME = ["N", "H", "W", "P", "Q", *(f"{t}_stride_{d}" for t in PoolLayouts._fields for d in "nhwc")]


@triton.jit
@no_type_check
def unravel_rows(N, H, W, C: tl.constexpr, CHANNELS_FAST: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr):
    """This program's elements of an [N, C, H, W] tensor: n, h, w [ROWS], channels [ROWS, VEC], and whether the rows
    exist.

    Elements are counted in 64 bits, but divided in 32: the 64-bit division is done once a program.
    """
    lane = tl.arange(0, ROWS)
    start = tl.program_id(0).to(tl.int64) * ROWS
    ok = start + lane < N.to(tl.int64) * H * W * (C // VEC)
    width = W.to(tl.uint32)
    height = H.to(tl.uint32)
    if CHANNELS_FAST:
        i = (start % (C // VEC)).to(tl.uint32) + lane.to(tl.uint32)
        pixel = (start // (C // VEC)).to(tl.uint32) + i // (C // VEC)
        c = i % (C // VEC)
        n = pixel // width // height
        h = pixel // width % height
    else:
        plane = H.to(tl.int64) * W
        i = (start % plane).to(tl.uint32) + lane.to(tl.uint32)
        pixel = i % (width * height)
        channel = start // plane + i // (width * height)
        c = (channel % C).to(tl.uint32)
        n = (channel // C).to(tl.uint32)
        h = pixel // width
    c = (c.to(tl.int32) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    return n, h.to(tl.int32), (pixel % width).to(tl.int32), c, ok


@triton.jit
@no_type_check
def element_offset(n, h, w, c, strides):
    """Elements from the start of a tensor of these layout.Strides to channels c [ROWS, VEC] of pixels (n, h, w), [ROWS]
    of them.
    """
    return pixel_offset(n, h, w, strides)[:, None] + channel_offset(c, strides.c)


@triton.jit
@no_type_check
def step_offset(h, w, strides):
    """Elements from one pixel to another, h rows below and w columns to the right of it."""
    return (h.to(tl.int64) * strides.h + w.to(tl.int64) * strides.w) * strides.align


@triton.jit
@no_type_check
def lies_within(ok, h, w, H, W):
    """Which of the pixels (h, w) that are ok lie within H rows and W columns."""
    return ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
@no_type_check
def first_covering(h, w, g: tl.constexpr):
    """The first of the g.cover_h x g.cover_w windows that may cover pixel (h, w)."""
    p = (h + g.pad_h) // g.stride_h - (g.cover_h - 1)
    q = (w + g.pad_w) // g.stride_w - (g.cover_w - 1)
    return p, q


def plan_rows(
    kernel: Any, problem: PoolProblem, layouts: PoolLayouts, acc: tl.dtype, loop: int, **records: Any
) -> launch.Launch[Any]:
    """A launch of `kernel`, which computes in the dtype `acc`; `loop` is the number of turns of its loop, `records`
    further constexpr arguments.
    """
    g = problem
    present = {name: t for name, t in zip(layouts._fields, layouts, strict=True) if t is not None}
    *_, result = present.values()
    channels_fast = is_channels_last(result)
    vec = gcd(g.C, VECTOR_BYTES // max(t.dtype.itemsize for t in present.values())) if channels_fast else 1
    tile = PoolTile(32 * NUM_WARPS * max(1, 4 // vec), vec, channels_fast)
    strides = {name: strides_nhwc(t) for name, t in present.items()}
    return launch.Launch(
        kernel, (cdiv(prod(result.shape) // vec, tile.ROWS),), g.N, g.H, g.W, g.P, g.Q,
        *(s for t in strides.values() for s in t[:4]),
        tile=tile, g=g.geometry(), align=PoolAlignments(**{name: s.align for name, s in strides.items()}), **records,
        ACC=acc, UNROLL=loop if loop <= MAX_UNROLL else PART_UNROLL,
        ROWS=tile.ROWS, VEC=vec, CHANNELS_FAST=channels_fast, num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
