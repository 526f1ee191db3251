"""Rows of the tables of measured tiles: what was measured of one convolution, or of one residual block, on one GPU, and
how a file says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from .gather.depthwise.tiles import StripTile
from .problem import ConvProblem
from .tiling import Operation, PackedTile, TileConfig
from .tma.tiles import BoxTile

Winner = Literal["kernels", "library"]
CONVOLUTION, BLOCK = "convolution", "block"  # kinds of rows; a row of a convolution need not say its kind

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
    def batch(self) -> int:
        return self.problem.N

    @property
    def but_for_batch(self) -> Key:
        return self._replace(problem=replace(self.problem, N=1))


class BlockKey(NamedTuple):
    """What the row of a residual block in training is looked up by.

    gpu, arch, dtype: as in Key. layout: of x and of the filters of each layer, as in Key. problems: the convolutions of
    the branch in their order, and then that of the shortcut if `projection`, else the shortcut is x itself.
    """

    gpu: str
    arch: int
    dtype: str
    layout: str
    projection: bool
    problems: tuple[ConvProblem, ...]

    @property
    def batch(self) -> int:
        return self.problems[0].N

    @property
    def but_for_batch(self) -> BlockKey:
        return self._replace(problems=tuple(replace(problem, N=1) for problem in self.problems))

    @property
    def branch(self) -> tuple[ConvProblem, ...]:
        return self.problems[: len(self.problems) - self.projection]


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
        return cls(key, _whole(FAMILIES[tile.pop("family")], tile), data["winner"], _times(data))


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One measurement of a residual block in training, forward and backward as a whole. winner: who is faster, our
    kernels or the library.

    microseconds: medians, of "kernels" and of "library", as far as they could be measured.
    """

    key: BlockKey
    winner: Winner
    microseconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """What the table of the row's GPU holds."""
        key = {**self.key._asdict(), "problems": [asdict(problem) for problem in self.key.problems]}
        named = {name: value for name, value in key.items() if name not in ("gpu", "arch")}
        return {"kind": BLOCK, **named, "winner": self.winner, "microseconds": self.microseconds}

    @classmethod
    def from_dict(cls, gpu: str, arch: int, data: Mapping[str, Any]) -> BlockRow:
        """Raises KeyError, TypeError or ValueError for what no row of this version says."""
        problems = tuple(_whole(ConvProblem, problem) for problem in data["problems"])
        if type(data["projection"]) is not bool:
            raise TypeError(f"projection is true or false, not {data['projection']!r}")
        key = BlockKey(gpu, arch, data["dtype"], data["layout"], data["projection"], problems)
        if not 2 <= len(key.branch) <= 3 or not _make_a_block(key):
            raise ValueError(f"these {len(problems)} convolutions make no residual block")
        if data["winner"] not in ("kernels", "library") or key.batch < 1:
            raise ValueError(f"winner is {data['winner']!r}, and the batch {key.batch}")
        return cls(key, data["winner"], _times(data))


AnyRow = TableRow | BlockRow


def row_from_dict(gpu: str, arch: int, data: Mapping[str, Any]) -> AnyRow:
    """Raises KeyError, TypeError or ValueError for what no row of this version says."""
    kind = data["kind"] if "kind" in data else CONVOLUTION  # noqa: SIM401 - what is no mapping has no `get`
    if kind not in (CONVOLUTION, BLOCK):
        raise ValueError(f"a row is of a {CONVOLUTION} or of a {BLOCK}, not of a {kind!r}")
    return (BlockRow if kind == BLOCK else TableRow).from_dict(gpu, arch, data)


def _make_a_block(key: BlockKey) -> bool:
    """Whether each convolution takes what the one before gives, and the shortcut fits the branch."""

    def taken(g: ConvProblem) -> tuple[int, ...]:
        return g.N, g.C, g.H, g.W

    def given(g: ConvProblem) -> tuple[int, ...]:
        return g.N, g.K, g.P, g.Q

    branch = key.branch
    x, end = taken(branch[0]), given(branch[-1])
    shortcut = key.problems[-1] if key.projection else None
    fits = x == end if shortcut is None else (taken(shortcut), given(shortcut)) == (x, end)
    return fits and all(given(before) == taken(after) for before, after in pairwise(branch))


def _times(data: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(time) for name, time in data["microseconds"].items()}


def _whole(kind: type, numbers: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of integers, all of them given, none below zero."""
    if set(numbers) != {field.name for field in fields(kind)}:
        raise ValueError(f"{kind.__name__} has other fields than {', '.join(numbers)}")
    if not all(type(n) is int and n >= 0 for n in numbers.values()):
        raise TypeError(f"{kind.__name__} takes integers that are not negative")
    return kind(**numbers)
