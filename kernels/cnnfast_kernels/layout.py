"""Shapes and strides without a tensor: what launches are prepared from, and the memory formats of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Strides(NamedTuple):
    """Strides in units of `align` elements, channels last; `c` is None where channels are adjacent.

    Handing kernels `stride * ALIGN` with a constexpr ALIGN tells the compiler that rows are aligned, hence vector
    loads, without specialising on values: another N, H or W compiles nothing.
    """

    n: int
    h: int
    w: int
    c: int | None
    align: int


class Layout(NamedTuple):
    """A tensor but for its memory and device: what plans are made from."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def stride(self, d: int | None = None) -> Any:
        return self.strides if d is None else self.strides[d]

    def dim(self) -> int:
        return len(self.shape)

    def data_ptr(self) -> int:
        """An address of memory that is still to be allocated, which is aligned."""
        return 0


Laid = torch.Tensor | Layout


def layout_of(t: Laid) -> Layout:
    return t if isinstance(t, Layout) else Layout(tuple(t.shape), t.stride(), t.dtype)


def dense(shape: Sequence[int], dtype: torch.dtype, fmt: torch.memory_format = torch.contiguous_format) -> Layout:
    """The layout of a tensor that memory.empty would allocate."""
    shape = tuple(shape)
    return Layout(shape, torch.empty(shape, device="meta", memory_format=fmt).stride(), dtype)


def strides_nhwc(t: Laid) -> Strides:
    """Strides of a tensor of logical shape [N, C, H, W] (weights: [K, C, R, S]), in the order n, h, w, c."""
    n, c, h, w = (s if size > 1 else 0 for s, size in zip(t.stride(), t.shape, strict=True))
    if c > 1:  # channels are apart: nothing to vectorise
        return Strides(n, h, w, c, 1)
    align = 8
    pixel = 0 if n or h or w else t.shape[1]  # one pixel is aligned as those of a larger image
    while n % align or h % align or w % align or pixel % align:
        align //= 2
    return Strides(n // align, h // align, w // align, None if t.shape[1] == 1 or c == 1 else c, align)


def is_packed(t: Laid) -> bool:
    """Whether a tensor [N, C, H, W] is channels_last without a gap: pixel m of all is m * C elements from its start."""
    _, C, H, W = t.shape
    packed = H * W * C, 1, W * C, C
    return all(size <= 1 or step == own for size, step, own in zip(t.shape, t.stride(), packed, strict=True))


def dense_alignment(t: Laid) -> tuple[int, bool]:
    """(alignment of its pixels in elements, whether it is channels_last) of a dense tensor [N, C, H, W].

    Raises ValueError where it is neither channels_last nor contiguous: what kernels write is allocated so.
    """
    _, C, H, W = t.shape
    if is_packed(t):
        return next(a for a in (8, 4, 2, 1) if C % a == 0), True
    n, c, h, w = (s if size > 1 else None for s, size in zip(t.stride(), t.shape, strict=True))
    if all(found in (None, wanted) for found, wanted in zip((n, c, h, w), (C * H * W, H * W, W, 1), strict=True)):
        return 1, False
    raise ValueError(f"a result of shape {tuple(t.shape)} must be dense, but has strides {tuple(t.stride())}")


class FpropMemory(NamedTuple):
    """How the tensors of a forward kernel lie in memory, as far as it is compiled for that: the alignment of their
    strides in elements, and whether y, which is dense, is channels_last or contiguous.

    own: of a pixel's channels, those that filters have, where the others may be anything, and have weights of zero; 0
    where filters have all of them.
    """

    x_align: int
    w_align: int
    residual_align: int
    y_align: int
    y_channels_last: bool
    own: int = 0


def is_channels_last(t: Laid) -> bool:
    """PyTorch's `is_channels_last_strides_2d`, which suggest_memory_format follows and Python cannot call."""
    if t.dim() != 4:
        return False
    N, C, H, W = t.shape
    n, c, h, w = t.stride()
    if c == 0 or C == 0 or H == 0 or W == 0 or N == 0:
        return False
    # every axis begins where the one inside it ends, from channels outwards
    columns = c * C if C > 1 else c
    rows = w * W if W > 1 else w
    images = h * H if H > 1 else h
    return w >= columns and h >= rows and n >= images and images != c


def result_format(*tensors: Laid) -> torch.memory_format:
    """The format of a result, as PyTorch's convolutions choose it: channels_last if any operand is."""
    return torch.channels_last if any(is_channels_last(t) for t in tensors) else torch.contiguous_format


def convolution_format(x: Laid, w: Laid) -> torch.memory_format:
    """The format of a convolution's result, and of the gradients of x and w, as PyTorch chooses it for x [N, C, H, W]
    and w [K, C, R, S].

    That is channels_last if either is, and neither is empty. PyTorch then copies them into that format, and asks what
    came of it once more: several images of one element each lie in every format after that, whatever their strides said
    before.
    """
    if 0 in x.shape or 0 in w.shape:
        return torch.contiguous_format
    found = False
    for t in (x, w):
        if is_channels_last(t):
            if t.shape[1:] != (1, 1, 1):
                return torch.channels_last
            found = True
    return torch.channels_last if found and any(map(_is_channels_last_copied, (x, w))) else torch.contiguous_format


def _is_channels_last_copied(t: Laid) -> bool:
    """`is_channels_last` of t.contiguous(memory_format=torch.channels_last), which is t itself where it lies so; t is
    not empty.
    """
    N, C, H, W = t.shape
    if N > 1 and C * H * W == 1:
        return False
    return is_channels_last(t) or not is_packed(t)
