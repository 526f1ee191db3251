"""What the plans of all three operations have in common: all of a call but its tensors. conv.py has the plans."""

from __future__ import annotations

from functools import cached_property

from .choosing import choose, measured
from .keys import DgradKey, FpropKey, WgradKey
from .questions import Tile
from .tiling import PackedTile
from .tma.tiles import BoxTile


class ConvolutionPlan:
    """What the three operations' plans have in common.

    The question, the measured row and the result's layout are there at once. The tile and the launch are made when the
    plan is first called: where the library serves, it never is.
    """

    def __init__(self, key: FpropKey | DgradKey | WgradKey) -> None:
        self.question = q = key.question
        self.row = measured(q) if key.tile is None else None
        self.result = q.result
        self.given_tile = key.tile

    @cached_property
    def tile(self) -> Tile:
        """The one that was given, or else the choice."""
        if self.given_tile is None:
            return choose(self.question, self.row)
        if isinstance(self.given_tile, BoxTile) and (reason := self.question.why_no_boxes):
            raise ValueError(
                f"tile={self.given_tile} is of the kernels that load by tensor maps, which cannot serve this call: "
                f"{reason}"
            )
        if isinstance(self.given_tile, PackedTile) and (reason := self.question.why_no_packing):
            raise ValueError(f"tile={self.given_tile} is for a packed image, which cannot serve this call: {reason}")
        return self.given_tile
