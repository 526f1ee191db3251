"""The positions of the operators of residual blocks, and what they stand for (block.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

RELU = "relu", 0.0  # an activation and its slope


class How(NamedTuple):
    """How a block is computed; block.py explains the words. bits: whether words of bits are left of the result;
    hands_over: whether the next block may be linked to this one; gram, projection_by_gram: whether the last layer's
    convolution, and the shortcut's, are trained by their Gram matrix.
    """

    fused: bool
    kept: bool
    bits: bool
    hands_over: bool
    gram: bool
    projection_by_gram: bool


class Member(NamedTuple):
    """A layer in forward. mean, var: the running statistics, if there are any."""

    w: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    momentum: float
    eps: float
    geometry: tuple[Any, ...]


class Record(NamedTuple):
    """What forward leaves of a layer; mu and products: see gram_statistics."""

    y: Tensor | None = None
    z: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    mu: Tensor | None = None
    products: Tensor | None = None


class Result(NamedTuple):
    """What backward is given of the block's result: itself, or its words of bits (cnnfast_kernels/words.py). sums:
    where the gradient is masked by these already, its sums over all pixels [K].
    """

    out: Tensor | None
    words: Tensor | None
    sums: Tensor | None


class TrainedMember(NamedTuple):
    """A layer in backward. needs: of w, gamma and beta."""

    w: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    left: Record
    eps: float
    geometry: tuple[Any, ...]
    needs: tuple[bool, ...]

    @property
    def norm(self) -> tuple[Any, ...]:
        """As operators take it: mean, var, gamma, beta."""
        return self.left.mean, self.left.var, self.gamma, self.beta


OF_MEMBER, OF_RECORD, OF_GEOMETRY = 5, len(Record._fields), 9


def flat_geometry(geometry: Any) -> tuple[int, ...]:
    """(stride, padding, dilation, groups) of a convolution as the nine numbers that a block's position has for it."""
    stride, padding, dilation, groups = geometry
    return *stride, *padding, *dilation, groups


def geometry_of(numbers: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(numbers[:2]), tuple(numbers[2:6]), tuple(numbers[6:8]), numbers[8]


def mean_of_last(layers: int) -> int:
    """Where the mean of a branch's last layer stands among the records."""
    return (layers - 1) * OF_RECORD + Record._fields.index("mean")


def cut(flat: Sequence[Any], size: int) -> list[Any]:
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def members_of(arguments: Sequence[Any]) -> tuple[Tensor, list[Member], Member | None, How, str]:
    """(x, the branch, the shortcut's layer, how, algorithm) of a forward operator's positions."""
    x, _, _, *tensors = arguments[:-5]
    momenta, eps, geometries, how, algorithm = arguments[-5:]
    tensors, geometries = cut(tensors, OF_MEMBER), cut(geometries, OF_GEOMETRY)
    found = [
        Member._make((*of, momentum, e, geometry_of(g)))
        for of, momentum, e, g in zip(tensors, momenta, eps, geometries, strict=False)
    ]
    branch = len(tensors) - 1
    return x, found[:branch], found[branch] if len(found) > branch else None, How(*how), algorithm


def trained_of(
    arguments: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor | None, Result, list[TrainedMember], TrainedMember | None, How, bool, str]:
    """(dout, x, the words of bits of x, the result, the branch, the shortcut's layer, how, whether dx is needed,
    algorithm) of a backward operator's positions.
    """
    dout, sums, x, words_below, out, words, *tensors = arguments[:-5]
    eps, geometries, how, needs, algorithm = arguments[-5:]
    tensors, geometries = cut(tensors, 3 + OF_RECORD), cut(geometries, OF_GEOMETRY)
    found = [
        TrainedMember._make((*of[:3], Record._make(of[3:]), e, geometry_of(g), tuple(need)))
        for of, e, g, need in zip(tensors, eps, geometries, cut(needs[1:], 3), strict=False)
    ]
    branch = len(tensors) - 1
    projection = found[branch] if len(found) > branch else None
    result = Result(out, words, sums)
    return dout, x, words_below, result, found[:branch], projection, How(*how), needs[0], algorithm
