"""The derivative of an activation whose result is kept as words of bits (words.py), in one pass over memory."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..dtypes import accumulator_dtype
from ..epilogue import finish_of
from ..layout import Layout, dense
from ..moments import combine_slots
from ..planes import PlaneTensor, common_planes, dense_format, load_tile, locate_tile, mergeable, tile_pointers
from ..words import WORD, BitWords, check_words, mask_gradient, tells_derivative

STRIDES = [f"{t}_stride_{d}" for t in ("dz", "g") for d in "nlc"]


class MaskedGradientOperands(NamedTuple):
    """dz and, of its shape, the result g; the words of bits; slots [tiles, 1, C], None where no sums are asked for."""

    dz: torch.Tensor
    words: torch.Tensor
    g: torch.Tensor
    slots: torch.Tensor | None


@triton.jit(do_not_specialize=["L", *STRIDES])
@no_type_check
def masked_gradient_kernel(
    dz_ptr, words_ptr, g_ptr, slots_ptr, L,
    dz_stride_n, dz_stride_l, dz_stride_c, g_stride_n, g_stride_l, g_stride_c,
    g: tl.constexpr, e: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient, and its slot in slots [tiles, 1, C], if there are any: the sums over its rows.

    g: PlaneGeometry; e: Finish; TOGETHER: whether all images are one plane, so that 32 rows share a word.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    ACTIVATION: tl.constexpr = e.activation
    at = locate_tile(L, g)
    rows = L * g.L_ALIGN
    gradient = mask_gradient(
        load_tile(PlaneTensor(dz_ptr, dz_stride_n, dz_stride_l, dz_stride_c, g.ALIGN), at, ACC),
        BitWords(
            words_ptr, at.n * rows + at.l, at.l_ok, at.c, at.c_ok, g.C, at.number.to(tl.int64) * g.BLOCK_L, rows,
            TOGETHER,
        ),
        tl.full((), e.slope, ACC), ACTIVATION,
    )  # fmt: skip
    if slots_ptr is not None:
        slot = slots_ptr + at.number.to(tl.int64) * g.C + at.c
        tl.store(slot, tl.sum(gradient, 0), mask=at.c_ok)  # rows that do not exist are 0
    pointers = tile_pointers(PlaneTensor(g_ptr, g_stride_n, g_stride_l, g_stride_c, g.ALIGN), at)
    tl.store(pointers, gradient.to(g_ptr.dtype.element_ty), mask=at.mask)


@launch.planned
def _plan_masked(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    like: tuple[int, ...],
    dtype: torch.dtype,
    activation: str,
    slope: float,
) -> tuple[launch.Launch[MaskedGradientOperands], Layout, Layout]:
    """The launch, the layout of g, and that of the slots."""
    g = dense(shape, dtype, dense_format(Layout(shape, like, dtype)))
    planes = common_planes(shape, (strides, g.strides), dtype, WORD)
    run = launch.Launch(
        masked_gradient_kernel, planes.grid, planes.units, *chain(*planes.strides), TOGETHER=planes.N == 1,
        e=finish_of(dtype, activation=activation, slope=slope), **planes.constants,
    )  # fmt: skip
    return run, g, dense((planes.tiles, 1, planes.C), accumulator_dtype(dtype))


def masked_gradient(
    dz: torch.Tensor, words: torch.Tensor, activation: str | None, slope: float, *, sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(g = dz * act', and, if asked, its sum over all axes but channels [C] in float32, or float64 for float64), where
    words of bits tell act'. g is of dz's dtype and memory format; the sums are those of what is not rounded.

    Shapes: dz [N, C, *spatial] in any layout, words [ceil(N * pixels / 32), C]. Raises ValueError for other words, and
    for activations whose derivative bits do not tell.
    """
    if activation is None or not tells_derivative(activation, slope):
        raise ValueError(
            f"activation={activation!r} with slope={slope} has no derivative that bits tell: use 'relu', or "
            "'leaky_relu' of a positive slope"
        )
    check_words(words, dz.shape, "words")
    like, dz = dz.stride(), mergeable(dz)
    run, layout, of_slots = _plan_masked(dz.shape, dz.stride(), like, dz.dtype, activation, slope)
    g, slots = memory.empty(layout, dz), memory.empty(of_slots, dz) if sums else None
    run(MaskedGradientOperands(dz, words, g, slots))
    return g, None if slots is None else combine_slots(slots)[0]
