"""What kernels cost on a GPU, by a model: nothing here was measured on a GPU."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from cnnfast_kernels.choosing import Question, Tile
from cnnfast_kernels.costs import Cost, Limiter
from cnnfast_kernels.gpus import KnownGpu
from cnnfast_kernels.tiling import Precision, TileConfig, gemm_extents
from cnnfast_kernels.tma.tiles import BoxTile


class Modelled(NamedTuple):
    """Of a convolution. roofline: seconds if the operation only multiplied, or only moved each of its tensors once.
    registers: of a thread.
    """

    cost: Cost
    roofline: float
    registers: int


class _Rates(NamedTuple):
    """FLOPs a second of half precision, bytes a second of memory and of the second-level cache: assumed."""

    flops: float
    memory: float
    cache: float


_RATES = {
    "b200": _Rates(1.8e15, 6.5e12, 8e12),
    "h200": _Rates(7.9e14, 4.3e12, 5.5e12),
    "h100": _Rates(7.9e14, 3.0e12, 5.5e12),
    "a100": _Rates(3.12e14, 1.75e12, 4.5e12),
    "l40s": _Rates(3.6e14, 0.8e12, 3.5e12),
    "rtx-4090": _Rates(1.65e14, 0.93e12, 4e12),
    "rtx-3090": _Rates(0.71e14, 0.86e12, 2.5e12),
}
_SLOWER: dict[Precision, int] = {"half": 1, "tf32": 2, "ieee": 13, "fp64": 13}


def memory_bytes_per_second(gpu: KnownGpu) -> float:
    return _RATES[gpu.name].memory


def flops_per_second(gpu: KnownGpu, precision: Precision) -> float:
    """Of matrix products."""
    return _RATES[gpu.name].flops / _SLOWER[precision]


def modelled(question: Question, tile: Tile, gpu: KnownGpu) -> Modelled:
    """What the convolution costs with this tile."""
    q, rates = question, _RATES[gpu.name]
    bytes_ = sum(prod(t.shape) * t.dtype.itemsize for t in (*q.images, q.w))
    parts: dict[Limiter, float] = {
        "tensor": q.problem.flops / flops_per_second(gpu, q.precision),
        "memory": bytes_ / rates.memory,
    }
    roofline, loaded = max(parts.values()), bytes_
    if isinstance(tile, TileConfig | BoxTile):
        rows, columns, depth = gemm_extents(q.problem, q.operation)
        m, n = tile.gemm(q.operation)[:2] if isinstance(tile, BoxTile) else (tile.BLOCK_M, tile.BLOCK_N)
        loaded = rows * columns * depth * (1 / m + 1 / n) * q.x.dtype.itemsize * q.problem.groups
    parts["l2"] = loaded / rates.cache
    limiter = max(parts, key=lambda part: parts[part])
    cost = Cost(parts[limiter], limiter, parts, 1, 1, 0.0, q.problem.flops / loaded if loaded else 0.0)
    return Modelled(cost, roofline, 0)
