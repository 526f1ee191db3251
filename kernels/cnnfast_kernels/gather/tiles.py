"""Masked loads and products that the gather kernels share."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from ..indexing import channel_offset


class Rows(NamedTuple):
    """Inside a kernel, the rows of a tile, [BLOCK_M] each: pointers to their pixels (h0, w0), which tap (0, 0) reads,
    and whether they exist. bits: of tap_bits, or None where the masks of taps are computed when they are needed.
    """

    pointers: tl.tensor
    h0: tl.tensor
    w0: tl.tensor
    ok: tl.tensor
    bits: tl.tensor


@triton.jit
@no_type_check
def tap_bits(h0, w0, row_ok, H, W, R: tl.constexpr, S: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr):
    """Bit r * S + s of a row says whether tap (r, s), at (h0 + r * STEP_H, w0 + s * STEP_W), lies in the image.

    R * S is at most 31.
    """
    columns = tl.zeros_like(w0)
    for s in tl.static_range(S):
        w = w0 + s * STEP_W
        columns |= ((w >= 0) & (w < W)).to(tl.int32) << s
    bits = tl.zeros_like(h0)
    for r in tl.static_range(R):
        h = h0 + r * STEP_H
        bits |= tl.where(row_ok & (h >= 0) & (h < H), columns << (r * S), 0)
    return bits


@triton.jit
@no_type_check
def unravel_rsc(step, C: tl.constexpr, R, S, BLOCK_K: tl.constexpr, FLAT: tl.constexpr):
    """Tap and channels of k-step `step` over R x S taps: (r, s, c, c_ok) with c [BLOCK_K].

    FLAT: the k-index runs over taps x channels without a gap, r and s are [BLOCK_K] too (few channels: no lane is
    wasted). Otherwise a step stays within one tap, and r and s are scalars.
    """
    if FLAT:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        c = k % C
        r = k // C // S
        s = k // C % S
        c_ok = k < R * S * C
    else:
        STEPS_C: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        tap = step // STEPS_C
        c = step % STEPS_C * BLOCK_K + tl.arange(0, BLOCK_K)
        r = tap // S
        s = tap % S
        c_ok = c < C
    return r, s, c, c_ok


@triton.jit
@no_type_check
def hide_steps(steps, rows, SUMS: tl.constexpr):
    """The same number of steps, where there are rows; of tiles with many SUMS, one that the compiler does not know.

    It unrolls a loop of up to eight steps that it can count, which smaller tiles gain from. With 128 x 128 sums it then
    spills registers.
    """
    if SUMS >= 128 * 128:
        return steps * tl.minimum(rows, 1)
    else:
        return steps


@triton.jit
@no_type_check
def reaches(rows, r, s, H, W, S: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr):
    """Whether tap (r, s) of each of the Rows lies in the image: [BLOCK_M]."""
    if rows.bits is None:
        h = rows.h0 + r * STEP_H
        w = rows.w0 + s * STEP_W
        return rows.ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    else:
        return ((rows.bits >> (r * S + s)) & 1) != 0


@triton.jit
@no_type_check
def load_taps(
    rows, k, H, W, strides,
    S: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The pixels that the Rows meet in a k-step: [BLOCK_M, BLOCK_K], zero in the padding.

    k: (r, s, c, c_ok) of unravel_rsc. The image is H x W, of these layout.Strides. EVEN: all of `c` exist.
    """
    r, s, c, c_ok = k
    if FLAT:
        h = rows.h0[:, None] + (r * STEP_H)[None, :]
        w = rows.w0[:, None] + (s * STEP_W)[None, :]
        mask = rows.ok[:, None] & c_ok[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    else:
        mask = reaches(rows, r, s, H, W, S, STEP_H, STEP_W)[:, None]
        if not EVEN:
            mask = mask & c_ok[None, :]
    tap = ((r * STEP_H).to(tl.int64) * strides.h + (s * STEP_W).to(tl.int64) * strides.w) * strides.align
    offset = tap + channel_offset(c, strides.c)
    return tl.load(rows.pointers[:, None] + offset[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def round_tf32(x):
    """The nearest tf32, ties away from zero, as cvt.rna has it.

    The matrix unit itself truncates, which is far worse where data are not negative: the errors do not cancel.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
@no_type_check
def multiply_accumulate(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; PRECISION: "half" | "tf32" | "ieee" | "fp64"."""
    if PRECISION == "tf32":
        acc = tl.dot(round_tf32(a), round_tf32(b), acc, input_precision="tf32", out_dtype=tl.float32)
    elif PRECISION == "fp64":
        acc = tl.dot(a, b, acc, out_dtype=tl.float64)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)
    return acc
