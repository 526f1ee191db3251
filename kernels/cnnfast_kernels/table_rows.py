"""Rows of the tables of measured tiles: what was measured of one convolution on one GPU, and how a file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from .gather.depthwise.tiles import StripTile
from .problem import ConvProblem
from .tiling import Operation, PackedTile, TileConfig
from .tma.tiles import BoxTile

Winner = Literal["kernels", "library"]

FAMILIES: dict[str, type] = {
    "gather": TileConfig,
    "gather, packed": PackedTile,
    "depthwise": StripTile,
    "tma": BoxTile,
}


class Key(NamedTuple):
    """What a row is looked up by.

    gpu: as CUDA names it; "" where there is none, which has no rows. arch: 90 for sm_90. epilogue: what the kernel does
    besides, as "norm residual relu", "stats" or ""; a bias is not counted. dtype: as PyTorch prints it without
    "torch.", or "tf32" for float32 multiplied as that. layout: of x, w and y, or their gradients: "NHWC NHWC NHWC" if
    channels are adjacent in all, "NCHW" where apart.
    """

    gpu: str
    arch: int
    operation: Operation
    epilogue: str
    dtype: str
    layout: str
    problem: ConvProblem

    @property
    def but_for_batch(self) -> Key:
        return self._replace(problem=replace(self.problem, N=1))


@dataclass(frozen=True, slots=True)
class TableRow:
    """One measurement. tile: the fastest of ours. winner: who is faster, it or the library.

    microseconds: medians, of "kernels" (the tile), "default" (what runs unmeasured) and "library", as far as they could
    be measured.
    """

    key: Key
    tile: Any
    winner: Winner
    microseconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """What the table of the row's GPU holds."""
        family = next(name for name, kind in FAMILIES.items() if type(self.tile) is kind)
        key = {**self.key._asdict(), "problem": asdict(self.key.problem)}
        tile = {"family": family, **asdict(self.tile)}
        named = {name: value for name, value in key.items() if name not in ("gpu", "arch")}
        return {**named, "tile": tile, "winner": self.winner, "microseconds": self.microseconds}

    @classmethod
    def from_dict(cls, gpu: str, arch: int, data: Mapping[str, Any]) -> TableRow:
        """Raises KeyError, TypeError or ValueError for what no row of this version says."""
        problem: ConvProblem = _whole(ConvProblem, data["problem"])
        key = Key(gpu, arch, data["operation"], data["epilogue"], data["dtype"], data["layout"], problem)
        if data["winner"] not in ("kernels", "library") or problem.N < 1:
            raise ValueError(f"winner is {data['winner']!r}, and the batch {problem.N}")
        tile = dict(data["tile"])
        times = {str(name): float(time) for name, time in data["microseconds"].items()}
        return cls(key, _whole(FAMILIES[tile.pop("family")], tile), data["winner"], times)


def _whole(kind: type, numbers: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of integers, all of them given, none below zero."""
    if set(numbers) != {field.name for field in fields(kind)}:
        raise ValueError(f"{kind.__name__} has other fields than {', '.join(numbers)}")
    if not all(type(n) is int and n >= 0 for n in numbers.values()):
        raise TypeError(f"{kind.__name__} takes integers that are not negative")
    return kind(**numbers)
