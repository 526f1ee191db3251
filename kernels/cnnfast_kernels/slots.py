"""Gradients of weights in slots, each from a part of the output pixels; and a kernel that adds the slots, in a fixed
order.
"""

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
    slots_ptr, dw_ptr, K, SLOTS, slot_stride, dw_stride_k, dw_stride_r, dw_stride_s, dw_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PIXEL: tl.constexpr, ROW: tl.constexpr, DW_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """BLOCK weights of dw: the sum over all slots, which are as [SLOTS, K, R, ROW] and have S taps of PIXEL channels at
    the beginning of each row. Of these channels dw has the first C.
    """
    weight = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = weight // (R * S * C)
    ok = k < K
    in_slot = weight
    if PIXEL != C or ROW != S * C:
        in_slot = weight // (S * C) * ROW + weight // C % S * PIXEL + weight % C
    acc = tl.zeros((BLOCK,), slots_ptr.dtype.element_ty)
    for first in range(0, SLOTS, BLOCK_SLOTS):
        slot = first + tl.arange(0, BLOCK_SLOTS)
        offsets = slot.to(tl.int64)[:, None] * slot_stride + in_slot[None, :]
        acc += tl.sum(tl.load(slots_ptr + offsets, mask=(slot < SLOTS)[:, None] & ok[None, :], other=0.0), 0)
    c = weight % C
    tap = weight // C % (R * S)
    dw_tap = (k * dw_stride_k + tap // S * dw_stride_r + tap % S * dw_stride_s) * DW_ALIGN
    tl.store(dw_ptr + dw_tap + channel_offset(c, dw_stride_c), acc.to(dw_ptr.dtype.element_ty), mask=ok)


class ReductionOperands(NamedTuple):
    """slots, laid as slots_layout says, and the result dw [K, C / groups, R, S]."""

    slots: torch.Tensor
    dw: torch.Tensor


def plan_reduction(
    slots: int, slot_stride: int, dw: Laid, pixel: int | None = None, row: int | None = None
) -> launch.Launch[ReductionOperands]:
    """Sets dw, in any layout and dtype, to the sum of so many slots, slot_stride elements apart.

    pixel: the channels of a slot, if it has more than dw, whose channels are the first of them. row: elements from one
    row of its taps to the next, if they are not just these.
    """
    K, C, R, S = dw.shape
    dws = strides_nhwc(dw)
    many = slots > 64  # then a program takes fewer weights and more of their slots at once
    BLOCK, BLOCK_SLOTS = (32, 64) if many else (256, 8)
    return launch.Launch(
        conv_wgrad_reduce_kernel, (cdiv(K * C * R * S, BLOCK),), K, slots, slot_stride, *dws[:4],
        C=C, R=R, S=S, PIXEL=pixel or C, ROW=row or S * (pixel or C), DW_ALIGN=dws.align,
        BLOCK=BLOCK, BLOCK_SLOTS=BLOCK_SLOTS, num_warps=4,
    )  # fmt: skip


def slots_layout(problem: ConvProblem, slots: int, dtype: torch.dtype) -> Layout:
    """Of a workspace [slots, K, R, S, C / groups], in the dtype that sums of products of `dtype` have."""
    g = problem
    return dense((slots, g.K, g.R, g.S, g.group_channels), accumulator_dtype(dtype))


def empty_slots(problem: ConvProblem, slots: int, like: torch.Tensor) -> torch.Tensor:
    """Workspace [slots, K, C / groups, R, S], channels innermost, in the dtype that sums of products of `like` have."""
    return memory.empty(slots_layout(problem, slots, like.dtype), like).permute(0, 1, 4, 2, 3)


class WgradLaunches(NamedTuple):
    """A gradient in slots of a workspace, and the reduction of these; without a workspace, the gradient at once."""

    slots: launch.Launch[WgradOperands]
    workspace: Layout | None = None
    reduction: launch.Launch[ReductionOperands] | None = None

    def __call__(self, operands: WgradOperands) -> None:
        if self.workspace is None or self.reduction is None:
            self.slots(operands)
        else:
            x, dy, dw = operands
            slots = memory.empty(self.workspace, x)
            self.slots(WgradOperands(x, dy, slots))
            self.reduction(ReductionOperands(slots, dw))


def plan_slots(
    problem: ConvProblem,
    slots: int,
    dw: Laid,
    dtype: torch.dtype,
    plan: Callable[[Laid, int, int], launch.Launch[WgradOperands]],
) -> WgradLaunches:
    """The gradient dw of operands of `dtype`, in so many slots.

    plan(slot, slots, stride) plans the launch that writes the slots, laid as `slot` is, `stride` elements apart.
    """
    if slots == 1:
        return WgradLaunches(plan(dw, 1, 0))
    workspace = slots_layout(problem, slots, dtype)
    K, R, S, C = workspace.shape[1:]
    size, k, r, s, c = workspace.strides
    slot = Layout((K, C, R, S), (k, c, r, s), workspace.dtype)
    return WgradLaunches(plan(slot, slots, size), workspace, plan_reduction(slots, size, dw))
