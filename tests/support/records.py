"""A kernel whose constants arrive as records, and which groups its strides in one: what compiling and recording are
tested with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Window(NamedTuple):
    """A record of numbers alone."""

    C: int
    R: int
    STRIDE: int


class Limits(NamedTuple):
    """A record inside a record."""

    LOWER: float
    UPPER: float | None


class Ending(NamedTuple):
    """A record of a name, a dtype, and another record."""

    ACTIVATION: str | None
    ACC: tl.dtype
    LIMITS: Limits


class Strides(NamedTuple):
    """A record that is made inside the kernel."""

    row: tl.tensor
    column: tl.tensor | None


@triton.jit
def finish(acc, e: tl.constexpr):
    if e.ACTIVATION == "clamp":
        acc = tl.maximum(acc, e.LIMITS.LOWER)
        if e.LIMITS.UPPER is not None:
            acc = tl.minimum(acc, e.LIMITS.UPPER)
    return acc


@triton.jit(do_not_specialize=["row_stride", "column_stride"])
def sum_rows_kernel(
    x_ptr, y_ptr, bias_ptr, row_stride, column_stride, g: tl.constexpr, e: tl.constexpr, BLOCK: tl.constexpr
):
    """y[i] = finish(bias + sum of C columns of R rows of x, which begin at row i * STRIDE). An absent column_stride
    is 1.
    """
    strides = Strides(row_stride, column_stride)
    C: tl.constexpr = g.C
    column = tl.arange(0, C)
    if strides.column is not None:
        column = column * strides.column
    first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), e.ACC)
    for r in range(g.R):
        row = (first * g.STRIDE + r) * strides.row
        acc += tl.sum(tl.load(x_ptr + row[:, None] + column[None, :]).to(e.ACC), 1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr).to(e.ACC)
    tl.store(y_ptr + first, finish(acc, e))


WINDOW, ENDING = Window(C=8, R=3, STRIDE=1), Ending("clamp", tl.float32, Limits(0.0, 40.0))
BLOCK = 16


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [64, 16], y [32], and a bias."""
    x = torch.arange(64 * 16).remainder(7).to(dtype).reshape(64, 16)
    return x, torch.zeros(2 * BLOCK, dtype=torch.float32), torch.tensor([-30.0])
