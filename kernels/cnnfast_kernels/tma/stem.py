"""Convolutions of an image of few channels, as the first of a network is, by the tensor-map kernels.

A pixel of three channels is no multiple of 16 bytes, which a tensor map demands. So the image is packed first: pixels
of 4 or 8 channels, the last of them zeros, and zeros to the left and right for the padding. Then S pixels side by side
are one run of memory, and the image is seen as [N, H, Q, S * channels], in which neighbours overlap: what a row of the
filter meets for each column of outputs. In these letters a 7x7 filter is one of 7x1 taps over 28 channels, and stride
and padding remain along H only. That costs a pass over memory, and a third of the products are of zeros; but every load
is one instruction, where the pointers of gather/ fetch channels one at a time.

No GPU has been asked yet whether it takes overlapping maps: nothing here runs by default, only where measuring found it
right and fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..layout import Laid, Layout, dense, layout_of
from ..operands import FpropOperands, WgradOperands
from ..problem import MAX_PIXELS, ConvProblem
from ..slots import WgradLaunches, plan_reduction
from ..tiling import cdiv
from .fprop import plan_tma_fprop
from .tiles import BoxTile
from .views import ALIGNMENT
from .wgrad import plan_slot_gradients


@triton.jit(
    do_not_specialize=["H", "W", "LEFT", "ROWS", "COLUMNS", "PIXELS", "stride_n", "stride_c", "stride_h", "stride_w"]
)
@no_type_check
def pack_pixels_kernel(
    image_ptr, packed_ptr, H, W, LEFT, ROWS, COLUMNS, PIXELS, stride_n, stride_c, stride_h, stride_w,
    C: tl.constexpr, PIXEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of the PIXELS of packed [N, ROWS, COLUMNS, PIXEL]: image [N, C, H, W] from column LEFT on, and zeros."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, PIXEL)
    w = m % COLUMNS - LEFT
    h = m // COLUMNS % ROWS
    n = m // COLUMNS // ROWS
    exist = m < PIXELS
    seen = exist & (w >= 0) & (w < W) & (h < H)
    pixels = image_ptr + n * stride_n + h * stride_h + w * stride_w
    values = tl.load(
        pixels[:, None] + c.to(tl.int64)[None, :] * stride_c, mask=seen[:, None] & (c < C)[None, :], other=0.0
    )
    tl.store(packed_ptr + m[:, None] * PIXEL + c[None, :], values, mask=exist[:, None])


def plan_packing(image: Laid, packed: Layout, left: int) -> launch.Launch:
    """Takes (image, packed): images [N, C, H, W] in any memory layout, and [N, PIXEL, ROWS, COLUMNS], dense and
    channels_last.
    """
    BLOCK = 512
    _, C, H, W = image.shape
    N, PIXEL, ROWS, COLUMNS = packed.shape
    pixels = N * ROWS * COLUMNS
    return launch.Launch(
        pack_pixels_kernel, (cdiv(pixels, BLOCK),), H, W, left, ROWS, COLUMNS, pixels, *image.stride(),
        C=C, PIXEL=PIXEL, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


class Packing(NamedTuple):
    """How a convolution is packed. problem: as the tensor-map kernels see it, on tensors laid as `x` and `w` are."""

    problem: ConvProblem
    image: Layout  # packed
    filters: Layout  # packed
    x: Layout  # the image as [N, S * pixel, ROWS, Q]: neighbours overlap
    w: Layout  # the filters as [K, taps * pixel, R, 1]: rows end at 16 bytes, with zeros


def pixel_of(problem: ConvProblem) -> int:
    """Channels of a packed pixel: as many as make the step from one output's pixels to the next a multiple of 16 bytes."""
    return ALIGNMENT if problem.stride_w % 2 else ALIGNMENT // 2


def packed_sizes(problem: ConvProblem) -> tuple[int, int]:
    """(ROWS, COLUMNS) of the packed image: rows are whole phases (boxes.py), columns hold the padding, and end at 16
    bytes.
    """
    g, pixel = problem, pixel_of(problem)
    columns = (g.Q - 1) * g.stride_w + g.S
    return cdiv(g.H, g.stride_h) * g.stride_h, cdiv(columns * pixel, ALIGNMENT) * ALIGNMENT // pixel


def is_packed(problem: ConvProblem) -> bool:
    """Whether this is how the tensor-map kernels would serve it: few channels, and no gaps between the taps of a row."""
    g = problem
    few = g.C <= pixel_of(g) and g.C < ALIGNMENT and g.groups == 1
    return few and g.dil_w == 1 and g.P > 0 and g.Q > 1 and g.N * prod(packed_sizes(g)) <= MAX_PIXELS


def packed_problem(problem: ConvProblem) -> ConvProblem:
    g = problem
    return replace(g, C=g.S * pixel_of(g), H=packed_sizes(g)[0], W=g.Q, S=1, stride_w=1, pad_w=0)


def packing_of(problem: ConvProblem, dtype: torch.dtype) -> Packing:
    g, pixel = problem, pixel_of(problem)
    rows, columns = packed_sizes(g)
    taps = cdiv(g.S * pixel, ALIGNMENT) * ALIGNMENT // pixel
    image = dense((g.N, pixel, rows, columns), dtype, torch.channels_last)
    filters = dense((g.K, pixel, g.R, taps), dtype, torch.channels_last)
    n, h, r = rows * columns * pixel, columns * pixel, taps * pixel
    x = Layout((g.N, g.S * pixel, rows, g.Q), (n, 1, h, g.stride_w * pixel), dtype)
    w = Layout((g.K, r, g.R, 1), (g.R * r, 1, r, r), dtype)
    return Packing(packed_problem(g), image, filters, x, w)


class StemPlan(NamedTuple):
    """Packs the image and the filters, and runs on what it packed."""

    image: Layout
    filters: Layout
    pack_image: launch.Launch
    pack_filters: launch.Launch
    run: launch.Launch

    def __call__(self, operands: FpropOperands) -> None:
        x, w = operands.x, operands.w
        image, filters = memory.empty(self.image, x), memory.empty(self.filters, w)
        self.pack_image((x, image))
        self.pack_filters((w, filters))
        self.run(FpropOperands(image, filters, *operands[2:]))


def plan_stem_fprop(
    problem: ConvProblem,
    tile: BoxTile,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None,
    *epilogue: Any,
) -> StemPlan:
    """As `plan_tma_fprop`, which see for the arguments; x and w in any memory layout."""
    packing = packing_of(problem, layout_of(x).dtype)
    run = plan_tma_fprop(packing.problem, tile, packing.x, packing.w, y, residual, *epilogue)
    pack_image, pack_filters = plan_packing(x, packing.image, problem.pad_w), plan_packing(w, packing.filters, 0)
    return StemPlan(packing.image, packing.filters, pack_image, pack_filters, run)


class StemWgradPlan(NamedTuple):
    """Packs the image; the gradient of packed filters, in slots whose sum goes to the filters' own places."""

    image: Layout
    pack_image: launch.Launch
    run: Callable[..., None]

    def __call__(self, operands: WgradOperands) -> None:
        x, dy, dw = operands
        image = memory.empty(self.image, x)
        self.pack_image((x, image))
        self.run(WgradOperands(image, dy, dw))


def plan_stem_wgrad(problem: ConvProblem, tile: BoxTile, x: Laid, dy: Laid, dw: Laid) -> StemWgradPlan:
    """Takes (x, dy, dw), as `tma_wgrad` does; x in any memory layout."""
    g = problem
    packing, pixel = packing_of(g, layout_of(x).dtype), pixel_of(g)
    row = g.S * pixel
    size = g.K * g.R * row
    workspace = dense((tile.SPLIT_K, g.K, g.R, g.S, pixel), torch.float32)
    slot = Layout((g.K, row, g.R, 1), (g.R * row, 1, row, row), torch.float32)
    partials = plan_slot_gradients(packing.problem, tile, packing.x, dy, slot, tile.SPLIT_K, size)
    run = WgradLaunches(partials, workspace, plan_reduction(tile.SPLIT_K, size, dw, pixel))
    return StemWgradPlan(packing.image, plan_packing(x, packing.image, g.pad_w), run)
