"""Normalise, activate and, if there is a residual, add, in one pass over memory, which may leave words of bits of the
result too (words.py), or the moments of its tiles.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..epilogue import Channels, finish, finish_of, load_channels, load_slopes
from ..layout import Laid, Layout, dense
from ..moments import TileRows, combine, moments_of
from ..planes import (
    Planes,
    PlaneTensor,
    TilePlace,
    common_planes,
    contiguous,
    dense_format,
    load_tile,
    load_vector,
    locate_tile,
    mergeable,
    tile_pointers,
)
from ..tile_moments import FirstRows, masks_of_first, store_moments
from ..words import WORD, store_bits, words_layout
from .channels import load_scale

STRIDES = [f"{t}_stride_{d}" for t in ("y", "residual", "z") for d in "nlc"]


class NormalizeOperands(NamedTuple):
    """y and, of its shape, residual and the result z; the others [C], contiguous, slopes also [1]; words of bits of z;
    moments of its tiles, [tiles, 2, C]. What is absent is None, z where only its words are wanted; without mean there
    is nothing of a norm but beta.
    """

    y: torch.Tensor
    mean: torch.Tensor | None
    var: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    residual: torch.Tensor | None
    z: torch.Tensor | None
    slopes: torch.Tensor | None
    words: torch.Tensor | None = None
    moments: torch.Tensor | None = None


class ResidualTile(NamedTuple):
    """Inside a kernel, what `finish` needs of the residual: its pointer, which is None where there is none, and how its
    tile is loaded.
    """

    source: tl.tensor
    tensor: PlaneTensor
    at: TilePlace


@triton.jit
@no_type_check
def load_residual_tile(residual):
    """[BLOCK_L, BLOCK_C] of a ResidualTile."""
    return tl.load(tile_pointers(residual.tensor, residual.at), mask=residual.at.mask, other=0.0)


@triton.jit(do_not_specialize=["L", *STRIDES])
@no_type_check
def normalize_kernel(
    y_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual_ptr, z_ptr, slopes_ptr, words_ptr, moments_ptr, L,
    y_stride_n, y_stride_l, y_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
    z_stride_n, z_stride_l, z_stride_c, g: tl.constexpr, e: tl.constexpr,
):  # fmt: skip
    """One tile of z; if asked for, its words of bits, where all images are one plane, and its moments as it is stored.

    g: PlaneGeometry; e: Finish.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    at = locate_tile(L, g)
    y = load_tile(PlaneTensor(y_ptr, y_stride_n, y_stride_l, y_stride_c, g.ALIGN), at, ACC)
    # Without statistics beta is a bias and no more.
    if mean_ptr is None:
        of_channels = Channels(beta_ptr, None, None, None, None, slopes_ptr)
        channels = load_channels(of_channels, at.c, at.c_ok, e)
    else:
        of_channels = Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slopes_ptr)
        # As epilogue.load_channels, but the mean comes after the scale: six registers fewer are in use.
        _, scale = load_scale(of_channels, at, e)
        channels = (load_vector(mean_ptr, at.c, at.c_ok, ACC), scale)
        if beta_ptr is not None:
            channels = channels + (load_vector(beta_ptr, at.c, at.c_ok, ACC),)
        if slopes_ptr is not None:
            channels = channels + (load_slopes(slopes_ptr, at.c, at.c_ok, e),)
    addend = PlaneTensor(residual_ptr, residual_stride_n, residual_stride_l, residual_stride_c, g.ALIGN)
    residual = ResidualTile(residual_ptr, addend, at)
    z = finish(y, channels, residual, of_channels, e, load_residual_tile)
    if z_ptr is not None:
        pointers = tile_pointers(PlaneTensor(z_ptr, z_stride_n, z_stride_l, z_stride_c, g.ALIGN), at)
        tl.store(pointers, z.to(z_ptr.dtype.element_ty), mask=at.mask)
    if words_ptr is not None:
        first = at.number.to(tl.int64) * g.BLOCK_L
        store_bits(words_ptr, first, L * g.L_ALIGN, at.c, at.c_ok, g.C, z, y_ptr.dtype.element_ty)
    if moments_ptr is not None:
        rows = FirstRows(at.rows >= g.BLOCK_L, at.rows)
        stored = z.to(y_ptr.dtype.element_ty)
        store_moments(moments_ptr, at.number, (stored,), rows, at.c, at.c_ok, g.C, masks_of_first)


@launch.planned
def _plan_normalize(
    shape: tuple[int, ...],
    y_strides: tuple[int, ...],
    residual_strides: tuple[int, ...] | None,
    like: tuple[int, ...] | None,
    dtype: torch.dtype,
    eps: float,
    activation: str | None,
    slope: float,
    one_slope: bool,
    words: bool = False,
) -> tuple[launch.Launch[NormalizeOperands], Layout | None, Layout | None, Planes]:
    """The launch, the layout of z, None where `like` is and z is not wanted, that of its words, None where they are
    not wanted, or the pass does not go through the pixels in their order, and the planes that it goes through.
    """
    z = None if like is None else dense(shape, dtype, dense_format(Layout(shape, like, dtype)))
    operands = y_strides, residual_strides, None if z is None else z.strides
    planes = common_planes(shape, operands, dtype, WORD if words else 16)
    e = finish_of(dtype, eps, activation, slope, one_slope)
    run = launch.Launch(normalize_kernel, planes.grid, planes.units, *chain(*planes.strides), e=e, **planes.constants)
    return run, z, words_layout(shape) if words and (planes.N == 1 or planes.rows == 0) else None, planes


@launch.planned
def _plan_mean(
    shape: tuple[int, ...], y_strides: tuple[int, ...], like: tuple[int, ...], dtype: torch.dtype, *how: Any
) -> tuple[launch.Launch[NormalizeOperands], Layout, Layout, TileRows]:
    """The launch that leaves moments, the layouts of z and of the moments, and which rows these stand for."""
    run, z, _, planes = _plan_normalize(shape, y_strides, None, like, dtype, *how, False)
    assert z is not None
    return run, z, *moments_of(planes, dtype)


def normalize(
    y: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    slopes: torch.Tensor | None = None,
    out_like: Laid | None = None,
) -> torch.Tensor:
    """z = act((y - mean) * gamma / sqrt(var + eps) + beta + residual), of y's dtype, in the memory format of
    `out_like`, by default y. Without mean and var it is act(y + beta + residual).

    Shapes: y and residual [N, C, *spatial] in any layouts, the others [C] of any floating dtypes. slope: leaky_relu's;
    slopes: prelu's, [C] or [1].
    """
    return normalize_leaving(y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, out_like, False)[0]


def normalize_words(
    y: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    slopes: torch.Tensor | None = None,
    out_like: Laid | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, its words of bits [ceil(N * pixels / 32), C], see words.py), z as `normalize` computes it. One pass leaves
    both where all tensors are channels_last; elsewhere the words are a pass of their own over z.
    """
    of = y, mean, var, gamma, beta, residual, eps, activation, slope, slopes, out_like
    z, words = normalize_leaving(*of, True)
    return z, pack_words(z) if words is None else words


def normalize_leaving(
    y: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    slopes: torch.Tensor | None,
    out_like: Laid | None,
    with_words: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(z, its words of bits if asked for, and if the pass can leave them): see `normalize` and `normalize_words`."""
    like = (y if out_like is None else out_like).stride()
    y, residual = mergeable(y), mergeable(residual)
    residual_strides = None if residual is None else residual.stride()
    how = eps, activation, slope, slopes is not None and slopes.numel() == 1, with_words
    run, layout, of_words, _ = _plan_normalize(y.shape, y.stride(), residual_strides, like, y.dtype, *how)
    assert layout is not None
    z, words = memory.empty(layout, y), None if of_words is None else memory.empty(of_words, y)
    mean, var, gamma, beta, slopes = contiguous(mean, var, gamma, beta, slopes)
    run(NormalizeOperands(y, mean, var, gamma, beta, residual, z, slopes, words))
    return z, words


def normalize_mean(
    y: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, the mean of each of its channels [C], in float32, or float64 for float64), z as `normalize` computes it of
    these: one pass leaves both, and the mean is that of the stored z.
    """
    like, y = y.stride(), mergeable(y)
    run, layout, of_moments, rows = _plan_mean(y.shape, y.stride(), like, y.dtype, eps, activation, slope)
    z, moments = memory.empty(layout, y), memory.empty(of_moments, y)
    norm = contiguous(mean, var, gamma, beta)
    run(NormalizeOperands(y, norm[0], norm[1], norm[2], norm[3], None, z, None, None, moments))
    return z, combine(moments, rows)[0]


def pack_words(z: torch.Tensor) -> torch.Tensor:
    """The words of bits of z [N, C, *spatial] in any layout: [ceil(N * pixels / 32), C], see words.py. Of z whose
    pixels are not one plane of rows, as those of channels_last are, a copy is read that is.
    """
    how = None, None, z.dtype, 0.0, None, 0.0, False, True
    z = mergeable(z)
    run, _, layout, _ = _plan_normalize(z.shape, z.stride(), *how)
    if layout is None:
        z = z.movedim(1, -1).contiguous().movedim(-1, 1)
        run, _, layout, _ = _plan_normalize(z.shape, z.stride(), *how)
    assert layout is not None
    words = memory.empty(layout, z)
    run(NormalizeOperands(z, None, None, None, None, None, None, None, words))
    return words
