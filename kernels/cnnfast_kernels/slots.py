"""The second stage of weight gradients: partial ones, each in a slot of its own, are added in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from . import launch, memory
from .dtypes import accumulator_dtype
from .indexing import channel_offset
from .layout import Laid, Layout, dense, strides_nhwc
from .operands import WgradOperands
from .problem import ConvProblem
from .tiling import cdiv


@triton.jit(do_not_specialize=["SLOTS", "slot_stride"])
@no_type_check
def conv_wgrad_reduce_kernel(
    partials_ptr, dw_ptr, K, SLOTS, slot_stride, dw_stride_k, dw_stride_r, dw_stride_s, dw_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PITCH: tl.constexpr, DW_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """BLOCK weights of dw: the sum over all slots of the first C channels of partials [SLOTS, K, R, S, PITCH]."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = e // (R * S * C)
    ok = k < K
    e_partial = e if PITCH == C else e // C * PITCH + e % C
    acc = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    for first in range(0, SLOTS, BLOCK_SLOTS):
        slots = first + tl.arange(0, BLOCK_SLOTS)
        offsets = slots.to(tl.int64)[:, None] * slot_stride + e_partial[None, :]
        acc += tl.sum(tl.load(partials_ptr + offsets, mask=(slots < SLOTS)[:, None] & ok[None, :], other=0.0), 0)
    c = e % C
    tap = e // C % (R * S)
    dw_offset = (k * dw_stride_k + tap // S * dw_stride_r + tap % S * dw_stride_s) * DW_ALIGN + channel_offset(
        c, dw_stride_c
    )
    tl.store(dw_ptr + dw_offset, acc.to(dw_ptr.dtype.element_ty), mask=ok)


def plan_reduction(slots: int, slot_stride: int, dw: Laid, pitch: int | None = None) -> launch.Launch:
    """Takes (partials, dw); see `reduce_partials`. `pitch`: channels of partials, of which the first are dw's."""
    K, C, R, S = dw.shape
    dws = strides_nhwc(dw)
    many = slots > 64  # then a program takes fewer weights and more of their slots at once
    BLOCK, BLOCK_SLOTS = (32, 64) if many else (256, 8)
    return launch.Launch(
        conv_wgrad_reduce_kernel, (cdiv(K * C * R * S, BLOCK),), K, slots, slot_stride, *dws[:4],
        C=C, R=R, S=S, PITCH=pitch or C, DW_ALIGN=dws.align, BLOCK=BLOCK, BLOCK_SLOTS=BLOCK_SLOTS, num_warps=4,
    )  # fmt: skip


def reduce_partials(partials: torch.Tensor, dw: torch.Tensor) -> None:
    """dw = the sum of the slots of `partials`, which is from empty_partials; dw [K, C / groups, R, S] in any layout and
    dtype.
    """
    plan_reduction(partials.shape[0], partials.stride(0), dw)((partials, dw))


def partials_layout(problem: ConvProblem, slots: int, dtype: torch.dtype) -> Layout:
    """Of a workspace [slots, K, R, S, C / groups] for partial gradients, in the dtype that sums of products of `dtype`
    have.
    """
    g = problem
    return dense((slots, g.K, g.R, g.S, g.group_channels), accumulator_dtype(dtype))


def empty_partials(problem: ConvProblem, slots: int, like: torch.Tensor) -> torch.Tensor:
    """Workspace [slots, K, C / groups, R, S], channels innermost, in the dtype that sums of products of `like` have."""
    return memory.empty(partials_layout(problem, slots, like.dtype), like).permute(0, 1, 4, 2, 3)


class WgradLaunches(NamedTuple):
    """Partial gradients and their sum, or, without a workspace, the gradient at once."""

    partials: launch.Launch
    workspace: Layout | None = None
    reduction: launch.Launch | None = None

    def __call__(self, operands: WgradOperands) -> None:
        if self.workspace is None:
            self.partials(operands)
        else:
            x, dy, dw = operands
            partials = memory.empty(self.workspace, x)
            self.partials(WgradOperands(x, dy, partials))
            self.reduction((partials, dw))


def plan_slots(
    problem: ConvProblem,
    slots: int,
    dw: Laid,
    dtype: torch.dtype,
    plan: Callable[[Laid, int, int], launch.Launch],
) -> WgradLaunches:
    """The gradient dw in that many slots. plan(slot, slots, stride) plans a launch that takes (x, dy, partials) and
    leaves `slots` partial gradients laid as `slot` is, `stride` elements apart. `dtype` is that of the operands.
    """
    if slots == 1:
        return WgradLaunches(plan(dw, 1, 0))
    workspace = partials_layout(problem, slots, dtype)
    K, R, S, C = workspace.shape[1:]
    size, k, r, s, c = workspace.strides
    slot = Layout((K, C, R, S), (k, c, r, s), workspace.dtype)
    return WgradLaunches(plan(slot, slots, size), workspace, plan_reduction(slots, size, dw))
