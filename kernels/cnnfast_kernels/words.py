"""Words of bits: of an activation's result z [N, C, *spatial] one bit an element, which tells the activation's
derivative. A sixteenth of z in half precision.

words [ceil(N * pixels / 32), C], int32 and contiguous: bit i of row j is that of pixel 32 * j + i, where the pixels of
all images are numbered one after the other, those of an image [*spatial] by rows. A bit is set unless z <= 0, by z as
it is stored: of a NaN it is set, for that is where the gradient of PyTorch's relu passes. That of its leaky_relu is
multiplied by the slope there, which bits do not tell. Bits of pixels that do not exist are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .activations import largest_zero
from .layout import Layout, dense

WORD = 32  # pixels whose bits are in one word
# Activations whose derivative follows from z > 0.
FROM_SIGN = ("relu", "leaky_relu")


@lru_cache(1024)
def words_layout(shape: tuple[int, ...]) -> Layout:
    """Of the words of a tensor [N, C, *spatial]."""
    N, C, *spatial = shape
    return dense((-(-N * prod(spatial) // WORD), C), torch.int32)


def check_words(words: torch.Tensor, shape: Sequence[int], name: str) -> None:
    """Raises ValueError where words are not those of a tensor of this shape [N, C, *spatial]."""
    rows = words_layout(tuple(shape)).shape
    if words.shape != rows or words.dtype != torch.int32 or not words.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous tensor {rows} of int32, a row for 32 pixels, but is {tuple(words.shape)} of "
            f"{words.dtype} with strides {words.stride()}"
        )


def tells_derivative(activation: str | None, slope: float) -> bool:
    """Whether bits tell the derivative of an activation, leaky_relu's with this slope."""
    return activation in FROM_SIGN and (activation != "leaky_relu" or slope > 0)


def unpack_words(words: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape [N, C, *spatial] and dtype of `like`, 1 where the bit is set, else 0; channels are
    adjacent.
    """
    N, C, *spatial = like.shape
    bits = torch.arange(WORD, device=words.device, dtype=torch.int32)
    pixels = ((words[:, None, :] >> bits[None, :, None]) & 1).flatten(0, 1)[: N * prod(spatial)]
    return pixels.view(N, *spatial, C).movedim(-1, 1).to(like.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Inside kernels


class BitWords(NamedTuple):
    """Inside a kernel, where the bits of a tile lie: of pixels `pixel` [rows], which are numbered through all images,
    and channels `column` of C in all, as far as they exist. source: of words, or None.

    first: the first pixel; pixels: how many there are. TOGETHER: whether the pixels are those from `first` on, a
    multiple of 32, so that 32 rows share a word.
    """

    source: tl.tensor
    pixel: tl.tensor
    row_ok: tl.tensor
    column: tl.tensor
    column_ok: tl.tensor
    C: tl.tensor
    first: tl.tensor
    pixels: tl.tensor
    TOGETHER: tl.constexpr


@triton.jit
@no_type_check
def load_bits(words):
    """Whether the bit of each element is set: [rows, columns] of BitWords."""
    TOGETHER: tl.constexpr = words.TOGETHER
    if TOGETHER:
        ROWS: tl.constexpr = words.pixel.shape[0]
        i = words.first // 32 + tl.arange(0, ROWS // 32)
        exist = (i < tl.cdiv(words.pixels, 32))[:, None] & words.column_ok[None, :]
        pointers = words.source + (i.to(tl.int64) * words.C)[:, None] + words.column[None, :]
        loaded = tl.load(pointers, mask=exist, other=0)
        bits = loaded[:, None, :] >> tl.arange(0, 32)[None, :, None]
        return (bits.reshape(ROWS, words.column.shape[0]) & 1) != 0
    else:
        exist = words.row_ok[:, None] & words.column_ok[None, :]
        rows = (words.pixel // 32).to(tl.int64) * words.C
        loaded = tl.load(words.source + rows[:, None] + words.column[None, :], mask=exist, other=0)
        return ((loaded >> (words.pixel % 32)[:, None]) & 1) != 0


@triton.jit
@no_type_check
def mask_gradient(dz, words, slope, ACTIVATION: tl.constexpr):
    """dz * act'(u) of BitWords, where ACTIVATION is one of FROM_SIGN."""
    return tl.where(load_bits(words), dz, dz * slope if ACTIVATION == "leaky_relu" else 0.0)


@triton.jit
@no_type_check
def store_bits(source, first, pixels, column, column_ok, C, u, STORED: tl.constexpr):
    """The words at `source` of a tile u [rows, columns], which is stored in the dtype STORED: its rows are the pixels
    from `first` on, a multiple of 32, as far as there are so many `pixels`; its columns are channels of C in all.

    Not the rounded numbers are compared: see activations.largest_zero.
    """
    ROWS: tl.constexpr = u.shape[0]
    COLUMNS: tl.constexpr = u.shape[1]
    tl.static_assert(ROWS % 32 == 0)
    is_set = ~(u <= largest_zero(u, STORED))
    bits = tl.where(is_set.reshape(ROWS // 32, 32, COLUMNS), (1 << tl.arange(0, 32))[None, :, None], 0)
    words = tl.sum(bits, 1)  # no two of its 32 numbers have a bit in common
    i = first // 32 + tl.arange(0, ROWS // 32)
    exist = tl.minimum(pixels - i * 32, 32).to(tl.int32)  # pixels of each word
    words = tl.where((exist < 32)[:, None], words & ((1 << tl.maximum(exist, 0)) - 1)[:, None], words)
    pointers = source + (i.to(tl.int64) * C)[:, None] + column[None, :]
    tl.store(pointers, words, mask=(exist > 0)[:, None] & column_ok[None, :])
