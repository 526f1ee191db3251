"""The geometry of convolution and pooling: extents, padding, strides, and what follows from them.

Pure Python: imports neither torch nor triton. The letters are those of CUTLASS and cuDNN:
input N C H W, filters K C R S, output N K P Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

# Rows of the implicit GEMM are counted in 32-bit integers; offsets into tensors are 64-bit.
MAX_PIXELS = 2**31 - 2**10  # the last tile may run past the end


def output_extent(size: int, window: int, stride: int, pad_before: int, pad_after: int, dilation: int) -> int:
    """Positions a window of `window` taps takes along an axis: floor((size + pads - dilation * (window - 1) - 1) /
    stride) + 1.
    """
    return (size + pad_before + pad_after - dilation * (window - 1) - 1) // stride + 1


class ConvGeometry(NamedTuple):
    """What a kernel of a convolution is compiled for: its constexpr argument `g`.

    C and K: channels and filters of a group, None where the kernel takes them at run time. Another image size compiles
    nothing: N, H, W, P and Q are no part of it.
    """

    C: int | None
    K: int | None
    groups: int
    R: int
    S: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """One convolution. P and Q are given, not derived, so that one end may be padded more than the other ("same", even
    filters).
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0  # rows of zeros above the image; those below follow from P
    pad_w: int = 0
    dil_h: int = 1
    dil_w: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or self.C % self.groups or self.K % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide both the input channels C={self.C} and the filters K={self.K}"
            )
        if max(self.N * self.H * self.W, self.N * self.P * self.Q) > MAX_PIXELS:
            raise RuntimeError(
                f"N*H*W={self.N * self.H * self.W} and N*P*Q={self.N * self.P * self.Q} "
                f"must not exceed {MAX_PIXELS} pixels"
            )

    @classmethod
    def of(
        cls,
        x_shape: tuple[int, ...],
        w_shape: tuple[int, ...],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> ConvProblem:
        """From shapes [N, C, H, W] and [K, C / groups, R, S]; padding is (top, bottom, left, right)."""
        N, C, H, W = x_shape
        K, _, R, S = w_shape
        top, bottom, left, right = padding
        P = output_extent(H, R, stride[0], top, bottom, dilation[0])
        Q = output_extent(W, S, stride[1], left, right, dilation[1])
        return cls(N, C, H, W, K, R, S, P, Q, *stride, top, left, *dilation, groups)

    def geometry(self, *, C: int | None = None, K: int | None = None) -> ConvGeometry:
        """What a kernel is compiled for. C, K: channels and filters of a group, if it is compiled for those."""
        strides, pads, dilations = (self.stride_h, self.stride_w), (self.pad_h, self.pad_w), (self.dil_h, self.dil_w)
        return ConvGeometry(C, K, self.groups, self.R, self.S, *strides, *pads, *dilations)

    @property
    def group_channels(self) -> int:
        return self.C // self.groups

    @property
    def group_filters(self) -> int:
        return self.K // self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether each output pixel is that of one input pixel, in the same order: 1x1, stride 1, no padding."""
        g = self
        return (g.R, g.S, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.P, g.Q) == (1, 1, 1, 1, 0, 0, g.H, g.W)

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.C and self.groups > 1

    @property
    def parities(self) -> int:
        """Sub-problems of dgrad: input pixels with the same (h + pad) mod stride see the same taps."""
        return self.stride_h * self.stride_w

    @property
    def taps_miss_h(self) -> bool:
        """Whether dgrad meets taps above or below dy; see taps_miss."""
        return taps_miss(self.H, self.P, self.R, self.stride_h, self.pad_h, self.dil_h)

    @property
    def taps_miss_w(self) -> bool:
        """Whether dgrad meets taps to the left or the right of dy."""
        return taps_miss(self.W, self.Q, self.S, self.stride_w, self.pad_w, self.dil_w)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one pass, taps in the padding counted as PyTorch's own counter does."""
        return 2 * self.N * self.P * self.Q * self.K * self.group_channels * self.R * self.S


def tap_step(stride: int, dilation: int) -> int:
    """Distance between taps that reach the same input residue modulo `stride`: r * dilation = const (mod stride)."""
    return stride // gcd(stride, dilation)


def taps_miss(inputs: int, outputs: int, taps: int, stride: int, pad: int, dilation: int) -> bool:
    """Whether, along one axis, dgrad's sum for some input has a tap whose output lies outside dy: input h and tap r
    with h + pad - r * dilation = p * stride, but not 0 <= p < outputs. Without such taps no product is of a zero that
    stands for nothing.
    """
    for first in range(min(stride, inputs)):
        last = first + (inputs - 1 - first) // stride * stride
        for r in range(taps):
            start = first + pad - r * dilation
            if start % stride == 0 and (start < 0 or start + last - first >= outputs * stride):
                return True
    return False


@lru_cache(4096)
def tap_pairs(outputs: int, inputs: int, taps: int, stride: int, pad: int, dilation: int) -> int:
    """How many pairs of an output pixel and a tap, along one axis, meet in the image and not in the padding."""
    pairs = 0
    for tap in range(taps):
        first = tap * dilation - pad  # what the first output sees
        pairs += max(min(outputs, -(-max(inputs - first, 0) // stride)) - -(-max(-first, 0) // stride), 0)
    return pairs


@lru_cache(4096)
def pixels_met(outputs: int, inputs: int, taps: int, stride: int, pad: int, dilation: int) -> int:
    """How many pixels of the image, along one axis, some tap of some output meets."""
    if taps == 1:
        return tap_pairs(outputs, inputs, taps, stride, pad, dilation)  # a long row of pixels, perhaps
    met = {p * stride - pad + r * dilation for p in range(outputs) for r in range(taps)}
    return sum(0 <= h < inputs for h in met)


class PoolGeometry(NamedTuple):
    """What a pooling kernel is compiled for: its constexpr argument `g`.

    At most cover_h x cover_w windows reach one pixel of the image. Another image size compiles nothing: N, H, W, P and
    Q are no part of it.
    """

    C: int
    R: int
    S: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    cover_h: int
    cover_w: int


@dataclass(frozen=True, slots=True)
class PoolProblem:
    """One pooling of an [N, C, H, W] input by R x S windows; P and Q are given because ceil_mode changes them."""

    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    P: int
    Q: int
    stride_h: int
    stride_w: int
    pad_h: int = 0
    pad_w: int = 0
    dil_h: int = 1
    dil_w: int = 1

    def __post_init__(self) -> None:
        if max(self.N * self.H * self.W, self.N * self.P * self.Q) > MAX_PIXELS:
            raise RuntimeError(
                f"N*H*W={self.N * self.H * self.W} and N*P*Q={self.N * self.P * self.Q} "
                f"must not exceed {MAX_PIXELS} pixels"
            )
        if self.R * self.S > MAX_PIXELS:
            raise RuntimeError(f"kernel_size={(self.R, self.S)} must not have more than {MAX_PIXELS} taps")

    @classmethod
    def of(
        cls,
        x_shape: tuple[int, ...],
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int] = (1, 1),
        ceil_mode: bool = False,
    ) -> PoolProblem:
        N, C, H, W = x_shape
        P, Q = (
            pool_extent(size, kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
            for i, size in enumerate((H, W))
        )
        return cls(N, C, H, W, *kernel_size, P, Q, *stride, *padding, *dilation)

    def geometry(self) -> PoolGeometry:
        """What kernels are compiled for."""
        g = self
        cover_h = (g.R - 1) * g.dil_h // g.stride_h + 1
        cover_w = (g.S - 1) * g.dil_w // g.stride_w + 1
        return PoolGeometry(g.C, g.R, g.S, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.dil_h, g.dil_w, cover_h, cover_w)

    @property
    def image(self) -> tuple[int, int, int, int]:
        """The input's shape."""
        return self.N, self.C, self.H, self.W

    @property
    def pooled(self) -> tuple[int, int, int, int]:
        """The output's shape."""
        return self.N, self.C, self.P, self.Q


def pool_extent(size: int, window: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> int:
    """PyTorch's rule: ceil_mode rounds up, but the last window must start inside the input or its left padding."""
    span = size + 2 * pad - dilation * (window - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    extent = -(-span // stride) + 1
    return extent - 1 if (extent - 1) * stride >= size + pad else extent
