"""Modules one after another, as a Sequential calls them: residual blocks among them that follow one another are linked.

A linked block finds its gradient masked and summed by the next one (ops/block.py). Nobody but that may see what stands
between the two, for what arrives there is no gradient of it. So a block is linked only where its call has no hooks, is
neither compiled by itself nor traced by torch.fx, and where its class says that its forward is one residual block and
nothing else: by a method

    linked(x, below) -> (its result, what the next block may take as its `below`), or None where it computes otherwise

which blocks.py and conversion/ give to their classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..functional.blocks import Link
from .fused import why_watched


def through(modules: Iterable[nn.Module], x: Any, below: Link | None = None) -> tuple[Any, Link | None]:
    """(x through all modules, what a block that follows them may take as its `below`)."""
    for module in modules:
        found = _linked(module, x, below)
        x, below = (module(x), None) if found is None else found
    return x, below


def may_link(module: nn.Module) -> bool:
    """Whether a module's class says that it can be linked."""
    return hasattr(type(module), "linked")


def _linked(module: nn.Module, x: Any, below: Link | None) -> tuple[Any, Link | None] | None:
    if not isinstance(x, Tensor) or why_watched(module) or _is_replaced(module):
        return None
    if type(module) is nn.Sequential:
        return through(module, x, below)
    return type(module).linked(module, x, below) if may_link(module) else None  # pyright: ignore


def _is_replaced(module: nn.Module) -> bool:
    """Whether calling a module runs something else than its forward: nn.Module.compile puts that there."""
    return getattr(module, "_compiled_call_impl", None) is not None
