"""Batch normalisation of a batch that lies in parts on several ranks, the processes of a group.

Each rank knows mean, variance and count of its part; those of all parts make the statistics of the batch. Backward,
each rank knows the sums of g and of g * xhat over its part (gradients.py), and dy takes the sums over all parts. How
many rows the batch has is known on the device alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..dtypes import KERNEL_DTYPES
from ..layout import Layout, dense
from ..moments import combine_slots, merge_moments
from ..planes import contiguous, mergeable
from ..rounding import round_quotient
from ..tiling import cdiv
from .gradients import NormalizeBackwardOperands, plan_backward
from .running import update
from .sums import GradientSumsOperands, plan_sums, strides


class RanksOperands(NamedTuple):
    """gathered [ranks, 2 * C + 1]: of each rank the means, the biased variances, and the count; what they are combined
    into, mean and var [C] and the total of rows [1]; and the running statistics [C], of any strides, or None.
    """

    gathered: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    total: torch.Tensor
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None


@triton.jit(do_not_specialize=["ranks", "mean_stride", "var_stride"])
@no_type_check
def combine_ranks_kernel(
    gathered_ptr, mean_ptr, var_ptr, total_ptr, running_mean_ptr, running_var_ptr, momentum: tl.float64,
    ranks, mean_stride, var_stride,
    C: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of all ranks, of which there are at most BLOCK_R. The strides are those of the running
    statistics.

    A rank without rows has no mean, and takes no part. Without two rows in all there is no unbiased variance, and the
    running statistics stay as they are.
    """
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    rank_ptr = gathered_ptr + r.to(tl.int64) * (2 * C + 1)
    count = tl.load(rank_ptr + 2 * C, mask=r < ranks, other=0.0)  # [BLOCK_R]
    mask = (count > 0)[:, None] & c_ok[None, :]
    entries = rank_ptr[:, None] + c[None, :]
    means = tl.load(entries, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_C]
    first = tl.min(tl.where(count > 0, r, BLOCK_R), 0)
    origin = tl.sum(tl.where((r == first)[:, None], means, 0.0), 0)
    mean, var = merge_moments(means, entries + C, count, origin, mask)
    total = tl.sum(count, 0)
    tl.store(mean_ptr + c, mean, mask=c_ok)
    tl.store(var_ptr + c, var, mask=c_ok)
    tl.store(total_ptr, total, mask=tl.program_id(0) == 0)
    if running_mean_ptr is not None:
        ok = c < tl.where(total > 1, C, 0)
        unbiased = var * round_quotient(total, total - 1.0)
        update(running_mean_ptr, c * mean_stride, ok, mean, momentum, ACC)
        update(running_var_ptr, c * var_stride, ok, unbiased, momentum, ACC)


@launch.planned
def _plan_ranks(
    ranks: int, C: int, dtype: torch.dtype, mean_stride: int, var_stride: int, momentum: float
) -> tuple[launch.Launch[RanksOperands], Layout, Layout]:
    BLOCK_R = triton.next_power_of_2(ranks)
    BLOCK_C = max(1, min(128, triton.next_power_of_2(C), 2048 // BLOCK_R))
    run = launch.Launch(
        combine_ranks_kernel, (cdiv(C, BLOCK_C),), momentum, ranks, mean_stride, var_stride,
        tile=f"{BLOCK_R}x{BLOCK_C} w4", C=C, ACC=KERNEL_DTYPES[dtype], BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    return run, dense((C,), dtype), dense((1,), dtype)


def combine_ranks(
    gathered: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None, momentum: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean [C], biased var [C], count [1]) of the whole batch, of gathered's dtype; and in place, if they are given,
    running = (1 - momentum) * running + momentum * batch, by the unbiased variance.

    gathered [ranks, 2 * C + 1], contiguous, float32 or float64: of each rank its means, its biased variances and how
    many rows these are of. What a rank without rows says of mean and variance is ignored. The ranks are combined in
    their order: from the same numbers every rank gets the same bits. If no rank has a row, mean and var are NaN.
    """
    C = gathered.shape[1] // 2
    mean_stride, var_stride = (0 if t is None else t.stride(0) for t in (running_mean, running_var))
    run, vector, number = _plan_ranks(gathered.shape[0], C, gathered.dtype, mean_stride, var_stride, momentum)
    mean, var, count = memory.empty(vector, gathered), memory.empty(vector, gathered), memory.empty(number, gathered)
    run(RanksOperands(gathered, mean, var, count, running_mean, running_var))
    return mean, var, count


def gradient_sums(
    dz: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> torch.Tensor:
    """The sums over dz's rows of g and of g * xhat, [2, C], of mean's dtype; see gradients.py. Zeros if there are no
    rows.

    z, the result of `normalize`, may be given where the activation's derivative follows from it; else it is None, and
    the activation's argument is computed again, to the same bits.
    """
    dz, y, z, residual = mergeable(dz), mergeable(y), mergeable(z), _argument(residual, z, activation)
    vectors: Any = contiguous(mean, var, gamma, beta)
    mean, var, gamma, beta = vectors
    run, layout = plan_sums(dz.shape, strides(dz, y, z, residual), dz.dtype, eps, activation, slope, 2)
    slots = memory.empty(layout, dz)
    run(GradientSumsOperands(dz, y, z, residual, mean, var, gamma, beta, slots))
    sums = memory.empty(layout.shape[1:], slots)
    combine_slots(slots, out=sums)
    return sums


def apply_sums(
    dz: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor | None,
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    sums: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    eps: float,
    activation: str | None,
    slope: float,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dy, dresidual), None where `needs` is false, of dz's shape and dtype and y's memory format.

    statistics: what `combine_ranks` returned; without a count, of dz's own rows. sums: those of all ranks'
    `gradient_sums`, [2, C] or two of [C]. z as there.
    """
    mean, var, count = statistics
    like = y.stride()  # of which `mergeable` may make a copy of another format
    dz, y, z, residual = mergeable(dz), mergeable(y), mergeable(z), _argument(residual, z, activation)
    vectors: Any = contiguous(mean, var, gamma, beta)
    mean, var, gamma, beta = vectors
    of_operands = strides(dz, y, z, residual)
    run, layout, _ = plan_backward(dz.shape, of_operands, like, dz.dtype, eps, activation, slope, *needs)
    dy, dresidual = (memory.empty(layout, dz) if need else None for need in needs)
    run(NormalizeBackwardOperands(dz, y, z, residual, mean, var, gamma, beta, sums[0], sums[1], count, dy, dresidual))
    return dy, dresidual


def _argument(residual: torch.Tensor | None, z: torch.Tensor | None, activation: str | None) -> torch.Tensor | None:
    """The residual where the activation's argument, of which it is a part, has to be computed again."""
    return None if activation is None or z is not None else mergeable(residual)
