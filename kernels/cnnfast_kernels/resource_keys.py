"""By which key the resources of the kernel that serves a convolution are found."""

from __future__ import annotations

from dataclasses import replace

from . import tiling
from .gather.depthwise import tiles as strips
from .gather.depthwise.tiles import StripTile
from .questions import Question, Tile
from .resources import EpilogueClass, ResourceKey
from .tiling import PackedTile, TileConfig
from .tma import tiles as boxes


def epilogue_class(q: Question) -> EpilogueClass:
    """The class of what follows the sums. An activation of one instruction is as good as none."""
    if q.statistics == "stats":
        return "moments"
    if q.operation == "dgrad":
        return "norm" if q.finished else "plain"
    light = q.statistics == "" and q.residual is None and q.activation in (None, "relu")
    return "plain" if light else "norm"


def resource_key(q: Question, tile: Tile) -> ResourceKey:
    """That of the convolution's own kernel, with `tile`: not of what packs its operands or adds the slots of a
    gradient.
    """
    if isinstance(tile, StripTile):
        family, form = "depthwise", strips.form_of(q.problem)
    elif isinstance(tile, PackedTile):
        problem, operation, _, adjacent, _ = q.packed_how
        family, form = "conv", tiling.form_of(problem, operation, tile, adjacent)
    elif isinstance(tile, TileConfig):
        family, form = "conv", tiling.form_of(q.problem, q.operation, tile, q.adjacent)
    else:
        family, form = "tma", boxes.form_of(q.boxed, q.operation, tile)
    name = str(replace(tile, SPLIT_K=1)).removeprefix("packed ")
    return ResourceKey(f"{family}_{q.operation}_kernel", form, name, epilogue_class(q), q.precision, q.gpu.arch)
