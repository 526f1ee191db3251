"""Index algebra of kernels over [N, C, H, W] tensors in any memory layout.

Offsets to a pixel are 64-bit from the start, so that none overflows; a pointer may lie outside its tensor as long as
the mask of the load that uses it is false there.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def unravel_npq(m, M, P, Q):
    """Row m of the implicit GEMM as (n, p, q), and whether it exists."""
    q = m % Q
    t = m // Q
    return t // P, t % P, q, m < M


def divisor(d: int) -> tuple[int, int]:
    """(magic, shift) for `divide`, of 1 <= d < 2**31. The magic number takes 32 bits, so that every d gives the same
    argument types.
    """
    shift = (d - 1).bit_length()
    return -(-(1 << (31 + shift)) // d), shift


@triton.jit
@no_type_check
def divide(m, magic, shift):
    """m // d for 0 <= m < 2**31 by Granlund and Montgomery's multiplication: 3 instructions where a runtime d takes
    some 20.
    """
    return (tl.umulhi(m.to(tl.uint32) * 2, magic.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
@no_type_check
def within(i, extent):
    """0 <= i < extent for 32-bit integers, in one comparison: what is negative is 2**31 and more without its sign. So
    is a sum that went beyond 2**31 - 1.
    """
    return i.to(tl.uint32) < extent.to(tl.uint32)


@triton.jit
@no_type_check
def class_axis(
    first, extent, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr
):
    """The class of pixels h = first + i * STRIDE, i < pixels, along one axis: (pixels, r0, taps, p0).

    It meets taps r = r0 + j * STEP, j < taps, and tap r of pixel i reads p = p0 + i - j * DIL * STEP / STRIDE.
    """
    if STRIDE == 1:
        return extent, 0, R, PAD
    else:
        pixels = (extent - first + STRIDE - 1) // STRIDE
        r0 = first * 0 + R
        for r in tl.static_range(R if R < STEP else STEP):
            r0 = tl.where((first + PAD - r * DIL) % STRIDE == 0, r, r0)
        taps = (R - r0 + STEP - 1) // STEP
        return pixels, r0, taps, (first + PAD - r0 * DIL) // STRIDE


@triton.jit
@no_type_check
def has_nan(t):
    """Whether any element is NaN. Over all axes at once: triton 3.7.1 cannot compile one after the other for sums of
    sm_100.
    """
    return tl.max((t != t).to(tl.int32)) > 0


@triton.jit
@no_type_check
def channel_offset(c, stride_c):
    """`stride_c` is None where channels are adjacent: then the compiler sees that, and loads vectors."""
    return c.to(tl.int64) if stride_c is None else c.to(tl.int64) * stride_c


@triton.jit
@no_type_check
def pixel_offset(n, h, w, strides):
    """Elements from the start of a tensor of these layout.Strides to pixel (n, h, w).

    Multiplying by their alignment last tells the compiler of it.
    """
    return (n.to(tl.int64) * strides.n + h.to(tl.int64) * strides.h + w.to(tl.int64) * strides.w) * strides.align


@triton.jit
@no_type_check
def dense_pixel_offset(m, n, H, W, C, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Elements from the start of a dense tensor [N, C, H, W] to channel 0 of pixel m of all, which is one of image n.

    The tensor is channels_last, and C a multiple of ALIGN, or contiguous.
    """
    if CHANNELS_LAST:
        return m.to(tl.int64) * (C // ALIGN) * ALIGN
    else:
        return m.to(tl.int64) + n.to(tl.int64) * (C - 1) * H * W


@triton.jit
@no_type_check
def dense_row_stride(W, C, CHANNELS_LAST: tl.constexpr):
    """Elements from one row of such a tensor to the next."""
    return W.to(tl.int64) * C if CHANNELS_LAST else W.to(tl.int64)


@triton.jit
@no_type_check
def dense_channel_offset(c, H, W, CHANNELS_LAST: tl.constexpr):
    """Elements from channel 0 of a pixel to channel c in such a tensor."""
    return c.to(tl.int64) if CHANNELS_LAST else c.to(tl.int64) * (H * W)
