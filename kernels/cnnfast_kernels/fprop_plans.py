"""The plans of forward passes: all of a call but its tensors. conv.py keeps them."""

from __future__ import annotations

from functools import cached_property

import torch

from . import launch, memory
from .batchnorm import contiguous, pack_words
from .dtypes import accumulator_dtype
from .epilogue import PLAIN, Epilogue, Finish
from .gather.depthwise.filters import StripLaunch
from .gather.depthwise.fprop import moments_rows, plan_depthwise_fprop
from .gather.depthwise.tiles import StripTile
from .gather.fprop import plan_fprop
from .gather.stem import plan_stem_fprop
from .keys import FpropKey
from .layout import Layout, dense
from .moments import TileRows, combine
from .operands import FpropOperands
from .packing import PackedFpropLaunches
from .plans import ConvolutionPlan
from .tiling import SQUARE_TILE, PackedTile, TileConfig, cdiv
from .tma.fprop import box_rows, has_whole_words, plan_tma_fprop
from .tma.stem import plan_tma_stem_fprop
from .tma.tiles import BoxTile
from .words import WORD, words_layout


class FpropPlan(ConvolutionPlan):
    def __init__(self, key: FpropKey) -> None:
        super().__init__(key)
        self.with_words, self.without_words = key.words, key.finish

    @cached_property
    def prepared(self) -> launch.Launch | StripLaunch | PackedFpropLaunches:
        q, tile = self.question, self.tile
        tensors, finish = (q.x, q.w, q.y, q.residual), self.finish
        if isinstance(tile, StripTile):
            return plan_depthwise_fprop(q.problem, tile, *tensors, finish)
        if isinstance(tile, BoxTile):
            plan = plan_tma_stem_fprop if q.packed else plan_tma_fprop
            return plan(q.problem, tile, *tensors, finish)
        if isinstance(tile, PackedTile):
            return plan_stem_fprop(q.problem, tile, q.precision, *tensors, finish)
        return plan_fprop(q.problem, tile, q.precision, *tensors, finish)

    @property
    def finish(self) -> Finish:
        """What the kernel is compiled for of its epilogue."""
        return self.without_words._replace(words=self.words is not None)

    @cached_property
    def words(self) -> Layout | None:
        """The layout of the words of bits that the kernel leaves; None where it leaves none.

        Kernels for other convolutions than 1x1 ones could: what norms and activates the result of a convolution at once
        in training is a 1x1 convolution by the Gram matrix of its input (gram.py).
        """
        q, tile = self.question, self.tile
        plain = q.problem.is_pointwise and q.problem.groups == 1
        if not (self.with_words and plain and q.precision == "half" and q.channels_last):
            return None
        if isinstance(tile, BoxTile):
            whole = has_whole_words(q.boxed, tile)
        else:
            whole = isinstance(tile, TileConfig) and tile.BLOCK_M % WORD == 0
            whole &= tile != SQUARE_TILE or q.residual is None  # beside a residual it would spill
        return words_layout(self.result.shape) if whole else None

    @cached_property
    def moments(self) -> tuple[Layout, TileRows]:
        """The layout of the moments that the kernel can leave of its tiles, and which pixels each tile has."""
        g, tile = self.question.problem, self.tile
        if isinstance(tile, StripTile):
            rows = moments_rows(g, tile)
            tiles = cdiv(rows.tiles, tile.BLOCK_M)
        elif isinstance(tile, BoxTile):
            rows = box_rows(self.question.boxed, tile)
            tiles = rows.tiles
        else:
            pixels = g.N * g.P * g.Q
            tiles = cdiv(pixels, tile.BLOCK_M)
            rows = TileRows(max(tiles, 1), pixels, tile.BLOCK_M)
        return dense((tiles, 2, g.K), accumulator_dtype(self.result.dtype)), rows

    def run(
        self, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, beside: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y, of the epilogue that the plan was made for, and with any bias."""
        y = memory.empty(self.result, x)
        if epilogue is PLAIN and beside is None:  # most convolutions: there is nothing to look at
            self.prepared(FpropOperands(x, w, y))
            return y
        bias, (mean, var, gamma, beta, _), residual, _, _, slopes = epilogue
        bias, mean, var, gamma, beta, slopes = contiguous(bias, mean, var, gamma, beta, slopes)
        self.prepared(FpropOperands(x, w, y, bias, mean, var, gamma, beta, residual, beside, slopes))
        return y

    def run_with_words(self, x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, its words of bits) by a plan with words: where the kernel leaves none, by a pass of their own."""
        if self.words is None:
            z = self.run(x, w, epilogue)
            return z, pack_words(z)
        words = memory.empty(self.words, x)
        return self.run(x, w, epilogue, words), words

    def run_with_statistics(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(y, mean [K], biased variance [K]) by a plan for "stats": the kernel leaves the moments of its tiles, and a
        small one combines them.
        """
        layout, rows = self.moments
        y, moments = memory.empty(self.result, x), memory.empty(layout, x)
        (bias,) = contiguous(bias)
        self.prepared(FpropOperands(x, w, y, bias, beside=moments))
        return y, *combine(moments, rows)
