"""What the pooling kernels that compute element by element share: the order of their programs, and how they are
launched.

A program computes ROWS x VEC neighbouring elements in the order of its result's memory. VEC channels that lie next to
each other are one vector access of one thread, and rows go to consecutive lanes: along channels where these are
adjacent, along w in NCHW, where VEC is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any, no_type_check

import triton
import triton.language as tl

from .. import launch
from ..indexing import channel_offset, pixel_offset
from ..layout import Laid, Strides, is_channels_last, strides_nhwc
from ..problem import PoolProblem
from ..tiling import MAX_REGISTERS, VECTOR_BYTES, cdiv

RUNTIME = ["N", "H", "W", "P", "Q", *(f"{t}_stride_{d}" for t in ("x", "y", "dx", "dy", "taps") for d in "nhwc")]

NUM_WARPS = 4
# All loads of a usual window are in flight at once; a loop over a larger one is unrolled in part, to compile as fast.
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


@triton.jit
@no_type_check
def unravel_rows(N, H, W, C: tl.constexpr, CHANNELS_FAST: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr):
    """This program's elements of an [N, C, H, W] tensor: n, h, w and whether they exist, [ROWS], and channels, [ROWS,
    VEC].

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
def element_offset(n, h, w, c, stride_n, stride_h, stride_w, stride_c, ALIGN: tl.constexpr):
    """Elements from the tensor's start to channels c [ROWS, VEC] of pixels (n, h, w) [ROWS]."""
    return pixel_offset(n, h, w, Strides(stride_n, stride_h, stride_w, stride_c, ALIGN))[:, None] + channel_offset(
        c, stride_c
    )


def plan_rows(kernel: Any, problem: PoolProblem, operands: dict[str, Laid], loop: int, **options: Any) -> launch.Launch:
    """A launch of `kernel`, whose first arguments are `operands`, the last of them its result; `loop` is the length of
    its loop.
    """
    g = problem
    *_, result = operands.values()
    channels_fast = is_channels_last(result)
    vec = gcd(g.C, VECTOR_BYTES // max(t.dtype.itemsize for t in operands.values())) if channels_fast else 1
    tile = PoolTile(32 * NUM_WARPS * max(1, 4 // vec), vec, channels_fast)
    strides = {name: strides_nhwc(t) for name, t in operands.items()}
    return launch.Launch(
        kernel, (cdiv(prod(result.shape) // vec, tile.ROWS),), g.N, g.H, g.W, g.P, g.Q, *(s for t in strides.values() for s in t[:4]),
        tile=tile, C=g.C, R=g.R, S=g.S, STRIDE_H=g.stride_h, STRIDE_W=g.stride_w, PAD_H=g.pad_h, PAD_W=g.pad_w,
        **{f"{name}_ALIGN": s.align for name, s in strides.items()}, **options,
        UNROLL=loop if loop <= MAX_UNROLL else PART_UNROLL, ROWS=tile.ROWS, VEC=vec, CHANNELS_FAST=channels_fast, num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
