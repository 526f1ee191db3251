"""The plans of gradients of images: all of a call but its tensors. conv.py keeps them."""

from __future__ import annotations

from functools import cached_property

import torch

from . import launch, memory
from .batchnorm import contiguous
from .dtypes import accumulator_dtype
from .gather.depthwise.dgrad import plan_depthwise_dgrad
from .gather.depthwise.filters import DepthwiseDgradOperands, StripLaunch
from .gather.depthwise.tiles import StripTile
from .gather.dgrad import plan_dgrad, tile_rows
from .gradient_epilogue import NO_EPILOGUE, GradientEpilogue, GradientLayouts
from .gradient_passes import apply_epilogue, sum_gradient
from .keys import DgradKey
from .layout import Layout, dense
from .moments import combine_slots
from .operands import BoxDgradOperands, DgradOperands
from .plans import ConvolutionPlan
from .second_product import SecondProduct
from .tma.dgrad import plan_tma_dgrad, slot_rows
from .tma.tiles import BoxTile


class DgradPlan(ConvolutionPlan):
    def __init__(self, key: DgradKey) -> None:
        super().__init__(key)
        self.finish = key.finish

    @cached_property
    def sums_second(self) -> bool:
        """Whether the kernel sums a second product. Where it does not, whoever has one adds it as a residual."""
        return isinstance(self.tile, BoxTile)

    @cached_property
    def prepared(self) -> launch.Launch | StripLaunch:
        q, tile = self.question, self.tile
        if isinstance(tile, StripTile):
            return plan_depthwise_dgrad(q.problem, tile, q.y, q.w, q.x)
        below = q.below._replace(residual=q.residual)
        if isinstance(tile, BoxTile):
            return plan_tma_dgrad(q.problem, tile, q.y, q.w, q.x, below, self.finish, q.second)
        if q.second is not None:
            raise ValueError(f"tile={tile} is of kernels that sum no second product: add it as a residual")
        below = GradientLayouts(*(t and q.x for t in below))
        return plan_dgrad(q.problem, tile, q.precision, q.y, q.w, q.x, below, self.finish)

    @cached_property
    def slots(self) -> Layout:
        """Of the sums that the kernel can leave of its tiles."""
        q, tile = self.question, self.tile
        assert not isinstance(tile, StripTile)
        rows = slot_rows(q.boxed, tile) if isinstance(tile, BoxTile) else tile_rows(q.problem, tile)
        return dense((rows, 1 if q.below.y is None else 2, q.problem.C), accumulator_dtype(self.result.dtype))

    def run(
        self,
        dy: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        epilogue: GradientEpilogue = NO_EPILOGUE,
        slots: torch.Tensor | None = None,
        second: SecondProduct | None = None,
    ) -> torch.Tensor:
        """dx, plus `bias` [C], and what the epilogue makes of it that the plan was made for. second: only where
        `sums_second`.
        """
        (bias,) = contiguous(bias)
        dx = memory.empty(self.result, dy)
        record = BoxDgradOperands if isinstance(self.tile, BoxTile) else DgradOperands
        plain = epilogue is NO_EPILOGUE and slots is None and second is None
        if plain and not isinstance(self.tile, StripTile):
            self.prepared(record(dy, w, dx, bias))  # most gradients: there is nothing to look at
            return dx
        if isinstance(self.tile, StripTile):
            self.prepared(DepthwiseDgradOperands(dy, w, dx, bias))
            return apply_epilogue(dx, epilogue)
        residual, y, z, words, norm, _, _ = epilogue
        if not isinstance(self.tile, BoxTile):
            residual, y, z = (self.as_result(t) for t in (residual, y, z))
        mean, var, gamma, beta = contiguous(*norm[:4])
        read = residual, y, z, words, mean, var, gamma, beta
        self.prepared(record(dy, w, dx, bias, *read, slots, *(second or ())))
        return dx

    def as_result(self, t: torch.Tensor | None) -> torch.Tensor | None:
        """What the kernels that load by pointers read beside dy, in the strides of dx: a copy, if it has others."""
        if t is None or t.stride() == self.result.strides:
            return t
        return memory.empty(self.result, t).copy_(t)

    def run_with_sums(
        self,
        dy: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        epilogue: GradientEpilogue,
        second: SecondProduct | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What `conv_dgrad_sums` returns, by a plan for sums: the kernel leaves those of its tiles, and a small one
        adds them.
        """
        if isinstance(self.tile, StripTile):
            dx = self.run(dy, w, bias, epilogue)
            return dx, *sum_gradient(dx, epilogue)
        slots = memory.empty(self.slots, dy)
        dx = self.run(dy, w, bias, epilogue, slots, second)
        (var,) = contiguous(epilogue.norm.var)
        return dx, *combine_slots(slots, var, epilogue.norm.eps, centred=True)
