"""What a convolution costs with a tile, on a GPU that need not be here: a model (costs.py). Nothing here touches a
tensor.
"""

from __future__ import annotations

from math import prod

from .costs import TileCost, TileWork, cost, roofline
from .gather import work as gathering
from .gather.depthwise import work as strips
from .gather.depthwise.filters import filters_layout
from .gather.depthwise.tiles import StripTile
from .gather.stem import run_packing
from .gpus import KnownGpu
from .packing import Packing
from .questions import Question, Tile
from .resource_keys import resource_key
from .resources import resources_of
from .tiling import PackedTile, TileConfig
from .tma import work as boxes
from .tma.stem import boxed_packing
from .traffic import Finishing, least_bytes, sum_bytes, weights


def work_of(q: Question, tile: Tile, packs: bool = True) -> TileWork:
    """What the kernels that serve a convolution with `tile` do, those that pack its operands and add its slots among
    them. packs: False for a gradient whose image the forward pass has packed.
    """
    finishing = Finishing(q.statistics == "stats", q.statistics == "norm", q.residual is not None)
    element = q.x.dtype.itemsize
    if isinstance(tile, StripTile):
        copied = q.operation != "wgrad" and filters_layout(q.w, tile)[1]
        return strips.work(q.problem, q.operation, q.precision, tile, finishing, copied)
    if isinstance(tile, PackedTile):
        packing, adjacent = run_packing(q.problem, q.x.dtype), q.packed_how[3]
        work = gathering.work(packing.problem, q.operation, q.precision, tile, finishing, adjacent)
        return _with_packing(q, work, packing, tile.SPLIT_K, finishing, packs)
    if isinstance(tile, TileConfig):
        work = gathering.work(q.problem, q.operation, q.precision, tile, finishing, q.adjacent)
        if q.second is None:
            return work
        # the second product is a forward pass, which reads x and writes what this kernel reads as its residual
        return work._replace(launches=work.launches + 1, further=work.further + 3 * prod(q.second.shape) * element)
    if not q.packed:
        return boxes.work(q.boxed, q.operation, tile, finishing, second=q.second is not None)
    packing = boxed_packing(q.problem, q.x.dtype)
    work = boxes.work(q.boxed, q.operation, tile, finishing, filter_channels=packing.w.shape[1])
    return _with_packing(q, work, packing, tile.SPLIT_K, finishing, packs)


def _with_packing(
    q: Question, work: TileWork, packing: Packing, slots: int, finishing: Finishing, packs: bool
) -> TileWork:
    """The work on a packed image, in which pixels that outputs share are seen several times, but lie in memory once;
    with the launches that pack.
    """
    g = q.problem
    element, a_sum = q.x.dtype.itemsize, sum_bytes(q.precision)
    image, filters = (prod(t.shape) * element for t in (packing.image, packing.filters))
    given = prod(q.x.shape) * element
    least, beside = least_bytes(g, q.operation, element), prod(q.y.shape) * element
    residual = beside if finishing.residual else 0
    work = work._replace(memory=least + residual, flops=g.flops)
    if q.operation == "fprop":
        moments = work.outside - beside - residual if finishing.moments else 0
        return work._replace(
            moved=image + filters + beside + residual + moments,
            launches=work.launches + 2,
            further=work.further + given + image + weights(g) * element + filters,
        )
    # one slot too is written in the dtype of sums; a slot has the channels of packed pixels, of which not all are read
    written = slots * weights(packing.problem) * a_sum
    return work._replace(
        outside=written,
        moved=image + beside + written,
        launches=1 + packs,
        further=packs * (given + image) + slots * weights(g) * a_sum + weights(g) * element,
    )


def cost_of(q: Question, tile: Tile, gpu: KnownGpu, packs: bool = True) -> TileCost:
    """What the convolution costs with `tile`; q.gpu has the architecture of `gpu`. packs: as work_of has it."""
    return cost(work_of(q, tile, packs), resources_of(resource_key(q, tile)), gpu)


def roofline_of(q: Question, tile: Tile, gpu: KnownGpu) -> float:
    """Seconds of a kernel that only multiplied, or only moved each tensor once, whichever is longer."""
    return roofline(work_of(q, tile), gpu)
