"""Running statistics, updated in place."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..planes import contiguous, load_vector
from ..rounding import round_quotient
from ..tiling import cdiv

BLOCK_C = 128


class UpdateOperands(NamedTuple):
    """Each [C]; mean and var, those of the batch, are contiguous."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


@triton.jit
@no_type_check
def update(running_ptr, offset, ok, of_batch, momentum, ACC: tl.constexpr):
    """In place running = (1 - momentum) * running + momentum * batch, of the channels that lie at `offset`."""
    keep = tl.full((), 1.0 - momentum, ACC)
    take = tl.full((), momentum, ACC)
    running = keep * load_vector(running_ptr, offset, ok, ACC) + take * of_batch
    tl.store(running_ptr + offset, running.to(running_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["mean_stride", "var_stride", "count"])
@no_type_check
def update_running_kernel(
    running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, momentum: tl.float64, mean_stride, var_stride, count,
    C: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels. The strides are those of the running statistics."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    unbiased = load_vector(var_ptr, c, c_ok, ACC) * round_quotient(count.to(ACC), (count - 1).to(ACC))
    update(running_mean_ptr, c * mean_stride, c_ok, load_vector(mean_ptr, c, c_ok, ACC), momentum, ACC)
    update(running_var_ptr, c * var_stride, c_ok, unbiased, momentum, ACC)


@launch.planned
def _plan_update(
    C: int, mean_stride: int, var_stride: int, momentum: float, count: int, wide: bool
) -> launch.Launch[UpdateOperands]:
    return launch.Launch(
        update_running_kernel, (cdiv(C, BLOCK_C),), momentum, mean_stride, var_stride, count,
        C=C, ACC=tl.float64 if wide else tl.float32, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip


def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    count: int,
) -> None:
    """In place running = (1 - momentum) * running + momentum * batch. All [C], of any floating dtypes.

    `var` is biased; running_var takes the unbiased var * count / (count - 1) of `count` rows, at least 2.
    """
    if count < 2:
        raise ValueError(f"the unbiased variance needs at least 2 values per channel, not {count}")
    wide = torch.float64 in (running_mean.dtype, mean.dtype)
    run = _plan_update(running_mean.shape[0], running_mean.stride(0), running_var.stride(0), momentum, count, wide)
    run(UpdateOperands(running_mean, running_var, *contiguous(mean, var)))
