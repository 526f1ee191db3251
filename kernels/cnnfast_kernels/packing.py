"""Images of few channels, as the first convolution of a network has, packed for both families of convolution kernels.

Three channels a pixel leave nothing to load as a vector. So the image is packed first: its pixels get 4 or 8 channels,
of which the last are zeros, and its rows get zeros to the left and right for the padding. Then S pixels side by side
are one run of memory, and the image is seen as [N, H, Q, S * channels]: for each column of outputs, what a row of the
filter meets. Neighbours overlap in this view. Through it a 7x7 filter is one of 7x1 taps over 28 channels, and stride
and padding remain along H only. Packing costs a pass over memory, and some of the products are of zeros; but loads are
vectors. gather/stem.py and tma/stem.py say which convolutions their kernels see so, and plan them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from . import launch, memory
from .dtypes import accumulator_dtype
from .indexing import channel_offset, divide, divisor, pixel_offset
from .layout import Laid, Layout, Strides, dense
from .operands import FpropOperands, WgradOperands
from .problem import MAX_PIXELS, ConvProblem
from .slots import WgradLaunches, plan_reduction
from .tiling import VECTOR_BYTES, cdiv

MOST_CHANNELS = 8  # of an image that is packed

UNSPECIALISED = [
    "H", "W", "LEFT", "ROWS", "COLUMNS", "PIXELS", "row_magic", "row_shift", "column_magic", "column_shift",
    "stride_n", "stride_c", "stride_h", "stride_w",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
@no_type_check
def pack_pixels_kernel(
    image_ptr, packed_ptr, H, W, LEFT, ROWS, COLUMNS, PIXELS, row_magic, row_shift, column_magic, column_shift,
    stride_n, stride_c, stride_h, stride_w,
    C: tl.constexpr, PIXEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of the PIXELS of packed [N, ROWS, COLUMNS, PIXEL]: image [N, C, H, W] from column LEFT on, and zeros around
    it.

    row_magic ... column_shift: of divisor(ROWS) and divisor(COLUMNS).
    """
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, PIXEL)
    row = divide(m, column_magic, column_shift)
    n = divide(row, row_magic, row_shift)
    h = row - n * ROWS
    w = m - row * COLUMNS - LEFT
    exist = m < PIXELS
    seen = exist & (w >= 0) & (w < W) & (h < H)
    strides = Strides(stride_n, stride_h, stride_w, stride_c, 1)
    pixels = image_ptr + pixel_offset(n, h, w, strides)
    offsets = channel_offset(c, stride_c)
    values = tl.load(pixels[:, None] + offsets[None, :], mask=seen[:, None] & (c < C)[None, :], other=0.0)
    tl.store(packed_ptr + m.to(tl.int64)[:, None] * PIXEL + c[None, :], values, mask=exist[:, None])


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
        pack_pixels_kernel, (cdiv(pixels, BLOCK),), H, W, left, ROWS, COLUMNS, pixels,
        *divisor(ROWS), *divisor(COLUMNS), *image.stride(), C=C, PIXEL=PIXEL, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# How a convolution is packed


class Packing(NamedTuple):
    """How a convolution is packed, and how kernels then see it: as `problem` on tensors laid out as `x` and `w` are."""

    problem: ConvProblem
    image: Layout  # as it is packed
    filters: Layout  # as they are packed
    x: Layout  # the packed image, seen as [N, channels, ROWS, Q]: neighbours overlap
    w: Layout  # the packed filters, seen as [K, taps * pixel, R, 1]: zeros fill a row up to a multiple of 16 bytes


def vector_length(dtype: torch.dtype) -> int:
    """Elements of 16 bytes."""
    return VECTOR_BYTES // dtype.itemsize


def packed_sizes(problem: ConvProblem, pixel: int, vector: int) -> tuple[int, int]:
    """(ROWS, COLUMNS) of the image, packed with `pixel` channels; `vector` elements are 16 bytes.

    ROWS is a multiple of the stride, so that the image can be seen in phases (tma/boxes.py). COLUMNS includes the
    padding, and a row of so many pixels is a multiple of 16 bytes.
    """
    g = problem
    columns = (g.Q - 1) * g.stride_w + g.S
    return cdiv(g.H, g.stride_h) * g.stride_h, cdiv(cdiv(columns * pixel, vector) * vector, pixel)


def why_not_packed(problem: ConvProblem, pixel: int, vector: int) -> str:
    """Why a convolution's image cannot be packed so, or "" if it can: only images of few channels are, for filters
    without gaps between the taps of a row.
    """
    g = problem
    if g.groups > 1:
        return "there are groups"
    if g.C > pixel:
        return f"{g.C} channels are too many for a packed pixel"
    if g.dil_w > 1:
        return "there are gaps between the taps of a row"
    if 0 in (g.N, g.C, g.H, g.W, g.K, g.R, g.S) or min(g.P, g.Q) < 1:
        return "a tensor is empty"
    if g.N * prod(packed_sizes(g, pixel, vector)) > MAX_PIXELS:
        return f"the packed image would have more than {MAX_PIXELS} pixels"
    return ""


def packed_problem(problem: ConvProblem, pixel: int, vector: int, channels: int) -> ConvProblem:
    """The convolution as kernels see it: a pixel's `channels` are those of the S pixels that an output meets in a row,
    and what they may read behind them.
    """
    g = problem
    return replace(g, C=channels, H=packed_sizes(g, pixel, vector)[0], W=g.Q, S=1, stride_w=1, pad_w=0)


def packing_of(problem: ConvProblem, dtype: torch.dtype, pixel: int, channels: int) -> Packing:
    """See packed_problem: `channels` is S * pixel, or that rounded up to a multiple of 16 bytes where outputs are a
    multiple of 16 bytes apart.
    """
    g, vector = problem, vector_length(dtype)
    rows, columns = packed_sizes(g, pixel, vector)
    taps = cdiv(cdiv(g.S * pixel, vector) * vector, pixel)
    image = dense((g.N, pixel, rows, columns), dtype, torch.channels_last)
    filters = dense((g.K, pixel, g.R, taps), dtype, torch.channels_last)
    n, h, r = rows * columns * pixel, columns * pixel, taps * pixel
    x = Layout((g.N, channels, rows, g.Q), (n, 1, h, g.stride_w * pixel), dtype)
    w = Layout((g.K, r, g.R, 1), (g.R * r, 1, r, r), dtype)
    return Packing(packed_problem(g, pixel, vector, channels), image, filters, x, w)


# ----------------------------------------------------------------------------------------------------------------------
# Handing a packed image on: the gradient of the filters needs the one that the forward pass made


class KeptImage:
    """What was packed of an image, if anything was."""

    __slots__ = ("packed",)

    def __init__(self) -> None:
        self.packed: torch.Tensor | None = None


class GivenImage(NamedTuple):
    """What was packed of `image`. No tensor but for the time of a call: see `given`."""

    image: torch.Tensor
    packed: torch.Tensor

    def serves(self, image: torch.Tensor, layout: Layout) -> bool:
        """Whether it is of this image, and packed so. How it is padded follows from the sizes of both."""
        packed = self.packed
        there = (tuple(packed.shape), packed.stride(), packed.dtype) == layout and packed.device == image.device
        return there and self.image.data_ptr() == image.data_ptr() and self.image.stride() == image.stride()


class _OfThread(threading.local):
    kept: KeptImage | None = None
    given: GivenImage | None = None


_of_thread = _OfThread()


@contextmanager
def keeping() -> Iterator[KeptImage]:
    """What this thread packs of an image while the context lasts is kept: the last, if there are several."""
    before, _of_thread.kept = _of_thread.kept, KeptImage()
    try:
        yield _of_thread.kept
    finally:
        _of_thread.kept = before


@contextmanager
def given(image: torch.Tensor, packed: torch.Tensor) -> Iterator[None]:
    """While the context lasts this thread need not pack `image` again, which has not changed since, if it is to be
    packed in the same way.
    """
    before, _of_thread.given = _of_thread.given, GivenImage(image, packed)
    try:
        yield
    finally:
        _of_thread.given = before


def packed_image(image: torch.Tensor, layout: Layout, pack: launch.Launch[PackingOperands]) -> torch.Tensor:
    """What was given, or else a tensor of that layout that `pack` fills."""
    there = _of_thread.given
    if there is not None and there.serves(image, layout):
        return there.packed
    made = memory.empty(layout, image)
    pack(PackingOperands(image, made))
    if _of_thread.kept is not None:
        _of_thread.kept.packed = made
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Launches on what is packed


class PackedFpropLaunches(NamedTuple):
    """Pack the image, unless it is there already, and the filters, and run the convolution on what was packed."""

    image: Layout
    filters: Layout
    pack_image: launch.Launch[PackingOperands]
    pack_filters: launch.Launch[PackingOperands]
    run: launch.Launch[FpropOperands]

    def __call__(self, operands: FpropOperands) -> None:
        x, w = operands.x, operands.w
        image, filters = packed_image(x, self.image, self.pack_image), memory.empty(self.filters, w)
        self.pack_filters(PackingOperands(w, filters))
        self.run(FpropOperands(image, filters, *operands[2:]))


def plan_packed_fprop(
    problem: ConvProblem, packing: Packing, x: Laid, w: Laid, run: launch.Launch[FpropOperands]
) -> PackedFpropLaunches:
    """x, w: of the problem, in any memory layout; run: the convolution of what is packed of them."""
    pack_image, pack_filters = plan_packing(x, packing.image, problem.pad_w), plan_packing(w, packing.filters, 0)
    return PackedFpropLaunches(packing.image, packing.filters, pack_image, pack_filters, run)


class PackedWgradLaunches(NamedTuple):
    """Pack the image, unless it is there already, and compute from it the gradient of the packed filters, in slots.

    The sum of the slots goes to where the filters' own gradient lies.
    """

    image: Layout
    pack_image: launch.Launch[PackingOperands]
    run: WgradLaunches

    def __call__(self, operands: WgradOperands) -> None:
        x, dy, dw = operands
        image = packed_image(x, self.image, self.pack_image)
        self.run(WgradOperands(image, dy, dw))


def plan_packed_wgrad(
    problem: ConvProblem,
    packing: Packing,
    slots: int,
    x: Laid,
    dw: Laid,
    plan: Callable[[Laid, int, int], launch.Launch[WgradOperands]],
) -> PackedWgradLaunches:
    """x, dw: of the problem, in any memory layout. The gradient is always left in slots, though there be only one: it
    has more channels than dw.

    plan(slot, slots, stride) plans the launch that writes the slots from the packed image: gradients of the packed
    filters, laid out as `slot` is, `stride` elements apart.
    """
    g, dtype = packing.problem, accumulator_dtype(packing.image.dtype)
    size = g.K * g.R * g.C
    slot = Layout((g.K, g.C, g.R, 1), (g.R * g.C, 1, g.C, g.C), dtype)
    reduction = plan_reduction(slots, size, dw, pixel=packing.image.shape[1], row=g.C)
    run = WgradLaunches(plan(slot, slots, size), dense((slots, g.K, g.R, g.C), dtype), reduction)
    return PackedWgradLaunches(packing.image, plan_packing(x, packing.image, problem.pad_w), run)
