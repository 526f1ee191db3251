"""A Sequential of residual blocks gets a forward that links them (nn/stages.py)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from ..functional.blocks import Link
from ..nn.stages import may_link, through
from .grafts import base_of, graft, grafted, own_class, set_class

_PURPOSE = "a stage of residual blocks"


def link(module: nn.Module) -> None:
    """Gives a Sequential in which two residual blocks follow one another a class whose forward links them."""
    unlink(module)
    if type(module) is nn.Sequential and any(may_link(a) and may_link(b) for a, b in pairwise(module.children())):
        module.__class__ = grafted(nn.Sequential, _PURPOSE, _graft_forward)


def unlink(module: nn.Module) -> None:
    """Gives such a Sequential its own class again."""
    own = own_class(module)
    if own.__dict__.get("_cnnfast_purpose") == _PURPOSE:
        set_class(module, base_of(own))


def _graft_forward() -> type:
    def forward(self: nn.Sequential, input: Any) -> Any:
        return through(self, input)[0]

    def linked(self: nn.Sequential, x: Any, below: Link | None) -> tuple[Any, Link | None]:
        return through(self, x, below)

    return graft(nn.Sequential, (nn.Sequential,), {"forward": forward, "linked": linked}, link, _PURPOSE)
