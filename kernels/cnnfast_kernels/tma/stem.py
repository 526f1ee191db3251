"""Convolutions of an image of few channels, as the first of a network is, by the tensor-map kernels.

A tensor map demands that pixels are multiples of 16 bytes, which three channels are not. So the image is packed first:
its pixels get 4 or 8 channels, of which the last are zeros, and its rows get zeros to the left and right for the
padding. Then S pixels side by side are one run of memory, and the image is seen as [N, H, Q, S * channels]: for each
column of outputs, what a row of the filter meets. Neighbours overlap in this view. Through it a 7x7 filter is one of
7x1 taps over 28 channels, and stride and padding remain along H only. Packing costs a pass over memory, and a third of
the products are of zeros; but every load is one instruction, where the pointers of gather/ fetch one channel at a time.

No GPU has shown yet that it takes maps whose rows overlap. So nothing here runs by default, only where measuring found
it right and fastest.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..epilogue import Finish
from ..indexing import channel_offset, pixel_offset
from ..layout import Laid, Layout, Strides, dense, layout_of
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
    """BLOCK of the PIXELS of packed [N, ROWS, COLUMNS, PIXEL]: image [N, C, H, W] from column LEFT on, and zeros around
    it.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, PIXEL)
    w = m % COLUMNS - LEFT
    h = m // COLUMNS % ROWS
    n = m // COLUMNS // ROWS
    exist = m < PIXELS
    seen = exist & (w >= 0) & (w < W) & (h < H)
    strides = Strides(stride_n, stride_h, stride_w, stride_c, 1)
    pixels = image_ptr + pixel_offset(n, h, w, strides)
    offsets = channel_offset(c, stride_c)
    values = tl.load(pixels[:, None] + offsets[None, :], mask=seen[:, None] & (c < C)[None, :], other=0.0)
    tl.store(packed_ptr + m[:, None] * PIXEL + c[None, :], values, mask=exist[:, None])


class PackingOperands(NamedTuple):
    """image [N, C, H, W] in any memory layout, and the result [N, PIXEL, ROWS, COLUMNS], dense and channels_last."""

    image: torch.Tensor
    packed: torch.Tensor


def plan_packing(image: Laid, packed: Layout, left: int) -> launch.Launch[PackingOperands]:
    """The launch that packs images, with `left` columns of zeros before the first of theirs."""
    BLOCK = 512
    _, C, H, W = image.shape
    N, PIXEL, ROWS, COLUMNS = packed.shape
    pixels = N * ROWS * COLUMNS
    return launch.Launch(
        pack_pixels_kernel, (cdiv(pixels, BLOCK),), H, W, left, ROWS, COLUMNS, pixels, *image.stride(),
        C=C, PIXEL=PIXEL, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


class Packing(NamedTuple):
    """How a convolution is packed, and how the tensor-map kernels then see it: as `problem` on tensors laid out as `x`
    and `w` are.
    """

    problem: ConvProblem
    image: Layout  # as it is packed
    filters: Layout  # as they are packed
    x: Layout  # the packed image, seen as [N, S * pixel, ROWS, Q]: neighbours overlap
    w: Layout  # the packed filters, seen as [K, taps * pixel, R, 1]: zeros fill a row up to a multiple of 16 bytes


def pixel_of(problem: ConvProblem) -> int:
    """Channels of a packed pixel: so many that the pixels of one output are a multiple of 16 bytes from the next's."""
    return ALIGNMENT if problem.stride_w % 2 else ALIGNMENT // 2


def packed_sizes(problem: ConvProblem) -> tuple[int, int]:
    """(ROWS, COLUMNS) of the packed image.

    ROWS is a multiple of the stride, so that the image can be seen in phases (boxes.py). COLUMNS includes the padding,
    and a row of so many pixels is a multiple of 16 bytes.
    """
    g, pixel = problem, pixel_of(problem)
    columns = (g.Q - 1) * g.stride_w + g.S
    return cdiv(g.H, g.stride_h) * g.stride_h, cdiv(columns * pixel, ALIGNMENT) * ALIGNMENT // pixel


def is_packed(problem: ConvProblem) -> bool:
    """Whether the tensor-map kernels would serve a convolution so: few channels, no gaps between the taps of a row."""
    g = problem
    few = g.C <= pixel_of(g) and g.C < ALIGNMENT and g.groups == 1
    return few and g.dil_w == 1 and g.P > 0 and g.Q > 1 and g.N * prod(packed_sizes(g)) <= MAX_PIXELS


def packed_problem(problem: ConvProblem) -> ConvProblem:
    """The convolution as the tensor-map kernels see it: a pixel's channels are those of the S pixels that an output
    meets in a row.
    """
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


class PackedFpropLaunches(NamedTuple):
    """Pack the image and the filters, and run the convolution on what was packed."""

    image: Layout
    filters: Layout
    pack_image: launch.Launch[PackingOperands]
    pack_filters: launch.Launch[PackingOperands]
    run: launch.Launch[FpropOperands]

    def __call__(self, operands: FpropOperands) -> None:
        x, w = operands.x, operands.w
        image, filters = memory.empty(self.image, x), memory.empty(self.filters, w)
        self.pack_image(PackingOperands(x, image))
        self.pack_filters(PackingOperands(w, filters))
        self.run(FpropOperands(image, filters, *operands[2:]))


def plan_stem_fprop(
    problem: ConvProblem,
    tile: BoxTile,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    e: Finish | None = None,
) -> PackedFpropLaunches:
    """As `plan_tma_fprop`, but that x and w may have any memory layout."""
    packing = packing_of(problem, layout_of(x).dtype)
    run = plan_tma_fprop(packing.problem, tile, packing.x, packing.w, y, residual, e)
    pack_image, pack_filters = plan_packing(x, packing.image, problem.pad_w), plan_packing(w, packing.filters, 0)
    return PackedFpropLaunches(packing.image, packing.filters, pack_image, pack_filters, run)


class PackedWgradLaunches(NamedTuple):
    """Pack the image, and compute from it the gradient of the packed filters, in slots.

    The sum of the slots goes to where the filters' own gradient lies.
    """

    image: Layout
    pack_image: launch.Launch[PackingOperands]
    run: WgradLaunches

    def __call__(self, operands: WgradOperands) -> None:
        x, dy, dw = operands
        image = memory.empty(self.image, x)
        self.pack_image(PackingOperands(x, image))
        self.run(WgradOperands(image, dy, dw))


def plan_stem_wgrad(problem: ConvProblem, tile: BoxTile, x: Laid, dy: Laid, dw: Laid) -> PackedWgradLaunches:
    """As `plan_tma_wgrad`, but that x may have any memory layout."""
    g = problem
    packing, pixel = packing_of(g, layout_of(x).dtype), pixel_of(g)
    row = g.S * pixel
    size = g.K * g.R * row
    workspace = dense((tile.SPLIT_K, g.K, g.R, g.S, pixel), torch.float32)
    slot = Layout((g.K, row, g.R, 1), (g.R * row, 1, row, row), torch.float32)
    gradients = plan_slot_gradients(packing.problem, tile, packing.x, dy, slot, tile.SPLIT_K, size)
    run = WgradLaunches(gradients, workspace, plan_reduction(tile.SPLIT_K, size, dw, pixel))
    return PackedWgradLaunches(packing.image, plan_packing(x, packing.image, g.pad_w), run)
