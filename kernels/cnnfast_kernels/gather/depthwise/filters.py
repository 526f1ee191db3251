"""What depthwise launches read: vectors of channels, and filters that lie tap by tap, copied if they do not."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch

from ... import launch
from ...layout import Laid, Layout, Strides, dense, strides_nhwc
from ...operands import FpropOperands
from ...tiling import VECTOR_BYTES
from .tiles import StripTile


def vector_length(*images: Laid) -> int:
    """Adjacent channels that one thread can load at once from each of `images`: 1, 2, 4 or 8; 0 where the channels of
    one are not adjacent.
    """
    length = VECTOR_BYTES // images[0].dtype.itemsize
    for t in images:
        s = strides_nhwc(t)
        if s.c is not None:
            return 0
        length = min(length, s.align)
    return length


def filters_as_channels(w: Laid) -> Layout:
    """Weights [K, 1, R, S] as one image [1, K, R, S]."""
    K, _, R, S = w.shape
    return Layout((1, K, R, S), (0, w.stride(0), w.stride(2), w.stride(3)), w.dtype)


class DepthwiseDgradOperands(NamedTuple):
    """dy [N, K, P, Q], w [K, 1, R, S] and the result dx [N, C, H, W], to which bias [C] is added, if given."""

    dy: torch.Tensor
    w: torch.Tensor
    dx: torch.Tensor
    bias: torch.Tensor | None = None


Operands = TypeVar("Operands", FpropOperands, DepthwiseDgradOperands)


class StripLaunch(NamedTuple, Generic[Operands]):
    """A launch whose threads load a tap of several filters at once: w is copied first, taps_major, unless it lies in
    memory that way. It is small beside the images.
    """

    run: launch.Launch[Operands]
    copies: bool

    def __call__(self, operands: Operands) -> None:
        self.run(operands._replace(w=taps_major(operands.w)) if self.copies else operands)


def taps_major(w: torch.Tensor) -> torch.Tensor:
    """A copy of w [K, 1, R, S] in which the filters are adjacent: tap by tap, the weights of all of them."""
    return w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def filters_layout(w: Laid, tile: StripTile) -> tuple[Strides, bool]:
    """Strides of w [K, 1, R, S] as the kernels take them, with filters as channels, and whether they are those of a
    copy, taps_major.
    """
    K, _, R, S = w.shape
    copies = tile.BLOCK_C > 1 and w.stride(0) != 1
    layout = dense((1, K, R, S), w.dtype, torch.channels_last) if copies else filters_as_channels(w)
    return strides_nhwc(layout), copies
