"""Graphs written by hand that show how values share memory, with integers that every order of sums keeps exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from cnnfast.engine.graph import Graph
from cnnfast.engine.operators import OPERATORS
from tests.support.agreement import integers
from tests.support.graphs import written

aten = torch.ops.aten
IMAGE = (None, 4, 4, 8)  # any number of images, of a power of two pixels: means are exact


def ours(name: str, x: fx.Proxy, *args: Any) -> Any:
    """A call of an operator of the engine's own, on a value of a graph that is being written."""
    return x.tracer.create_proxy("call_function", OPERATORS[f"cnnfast.{name}"], (x, *args), {})


def convolve(x: Any, weight: Any, residual: Any = None) -> Any:
    """A 3x3 convolution without bias that keeps the size, then ReLU."""
    return ours("convolution", x, weight, None, residual, [1, 1], [1, 1], [1, 1], 1, "relu", [])


def negative(x: Any) -> Any:
    return aten.mul.Tensor(x, -1)


def residual_blocks(c: Any, x: Any) -> Any:
    for _ in range(3):
        x = convolve(convolve(x, c.square), c.square, x)
    return aten.mean.dim(x, [2, 3])


def dense_block(c: Any, x: Any) -> Any:
    """Each convolution reads all that was made so far; what is read last was made first."""
    features = [convolve(x, c.square)]
    for weight in (c.square, c.square8, c.square12):
        whole = aten.cat.default(list(features), 1)
        features.append(convolve(aten.relu.default(whole), weight))
    return aten.cat.default(list(features), 1), aten.add.Tensor(features[1], features[0])


def branches(c: Any, x: Any) -> Any:
    """A concatenation of which some parts can be in place and others cannot."""
    a, b = convolve(x, c.square), aten.relu.default(x)
    one = aten.cat.default([a, x, b, b], 1)
    flat = aten.cat.default([aten.flatten.using_ints(a, 1), aten.flatten.using_ints(negative(b), 1)], -1)
    more = aten.cat.default([negative(a), c.image], 0)
    return aten.relu.default(one), flat, more, aten.cat.default([a, a], 2)


def shuffle(c: Any, x: Any) -> Any:
    left, right = chunks(aten.chunk.default(x, 2, 1), 2)
    both = aten.cat.default([left, aten.relu.default(right)], 1)
    turned = aten.transpose.int(aten.reshape.default(both, [-1, 2, 2, 4, 8]), 1, 2)
    return convolve(aten.reshape.default(turned, [-1, 4, 4, 8]), c.square)


def chunks(made: Any, count: int) -> list[Any]:
    return [made[index] for index in range(count)]


def nested(c: Any, x: Any) -> Any:
    """Concatenations of concatenations, along several dimensions, in front and behind."""
    a, b = convolve(x, c.square), negative(x)
    wide = aten.cat.default([negative(a), aten.cat.default([a, b], 3)], 3)
    high = aten.cat.default([wide, negative(wide)], 2)
    return aten.cat.default([negative(high), high], 1)


def views(c: Any, x: Any) -> Any:
    """A value that is read through a view long after its own last use, while others take memory and give it back."""
    first = convolve(x, c.square)
    turned = aten.permute.default(first, [0, 2, 3, 1])
    flat = aten.reshape.default(turned, [-1, 32, 4])
    for _ in range(4):
        x = convolve(x, c.square)
    return aten.add.Tensor(aten.reshape.default(aten.permute.default(x, [0, 2, 3, 1]), [-1, 32, 4]), flat)


def awkward_results(c: Any, x: Any) -> Any:
    """Inputs, constants, views, parts of values, one value twice, and values that are used again."""
    a = aten.relu.default(x)
    left, right = chunks(aten.chunk.default(a, 2, 1), 2)
    b = aten.add.Tensor(a, x)
    flat = aten.flatten.using_ints(b, 1)
    return x, c.image, a, a, left, flat, aten.flatten.using_ints(x, 1), negative(b), right


def two_inputs(c: Any, x: Any, y: Any) -> Any:
    total = ours("sum", x, y, None, [])
    twice = ours("sum", total, total, None, [])
    narrow = aten.mean.dim(twice, [2, 3], True)
    return ours("sum", twice, narrow, "relu", []), aten.cat.default([x, y], 0)


def written_over(c: Any, x: Any) -> Any:
    """Element-wise calls that may write over an argument, and those that may not: it is read again, or by this very
    call in another way.
    """
    a = convolve(x, c.square)
    b = ours("affine", a, c.scale, c.scale, None, None, [])
    d = convolve(b, c.square, b)
    e = ours("sum", d, aten.permute.default(aten.reshape.default(d, [-1, 4, 8, 4]), [0, 1, 3, 2]), None, [])
    f = aten.hardtanh.default(e, -2, 9)
    return ours("affine", negative(f), c.scale, c.scale, f, "relu", [])


CONSTANTS = {
    "square": integers(4, 4, 3, 3, seed=1) * (torch.arange(9).view(3, 3) % 4 == 0),
    "square8": integers(4, 8, 3, 3, seed=2) * (torch.arange(9).view(3, 3) % 4 == 0),
    "square12": integers(4, 12, 3, 3, seed=3) * (torch.arange(9).view(3, 3) % 4 == 0),
    "scale": integers(4, 1, 1, largest=2, seed=4),
    "image": integers(1, 4, 4, 8, largest=9, seed=5),
}
CASES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(residual_blocks, dense_block, branches, shuffle, nested),
        *(views, awkward_results, two_inputs, written_over),
    )
}


def graph_of(name: str) -> Graph:
    inputs = 2 if name == "two_inputs" else 1
    graph = written(CASES[name], *[IMAGE] * inputs, **CONSTANTS)
    graph.prune()
    return graph


def inputs_for(graph: Graph, batch: int) -> list[Tensor]:
    return [integers(batch, 4, 4, 8, largest=3, seed=seed) for seed in range(len(graph.inputs))]


class Drawn:
    """A graph that is being drawn: values, and their shapes but for the number of images. They stay from -8 to 8."""

    def __init__(self, draw: st.DrawFn, c: Any, x: Any) -> None:
        self.draw, self.c = draw, c
        self.values: list[tuple[Any, tuple[int, ...]]] = [(x, (4, 4, 8))]

    def pick(self, *shapes: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
        """One of the values, of one of these shapes if any are given."""
        return self.draw(st.sampled_from([v for v in self.values if v[1] in shapes or not shapes]))

    def negative(self) -> None:
        y, shape = self.pick()
        self.values.append((negative(y), shape))

    def sum(self) -> None:
        y, shape = self.pick()
        other, _ = self.pick(shape, (shape[0], 1, 1))
        self.values.append((ours("sum", y, other, "hardtanh", [-8, 8]), shape))

    def convolve(self) -> None:
        y, shape = self.pick((4, 4, 8))
        residual = self.draw(st.sampled_from([None, self.pick(shape)[0]]))
        geometry = [1, 1], [1, 1], [1, 1], 1
        result = ours("convolution", y, self.c.square, None, residual, *geometry, "hardtanh", [-8, 8])
        self.values.append((result, shape))

    def concatenate(self) -> None:
        y, shape = self.pick()
        dim = self.draw(st.integers(1, 3))
        parts = [y, *(self.pick(shape)[0] for _ in range(self.draw(st.integers(0, 2))))]
        whole = aten.cat.default(parts, self.draw(st.sampled_from([dim, dim - 4])))
        sizes = [size * len(parts) if i == dim - 1 else size for i, size in enumerate(shape)]
        self.values.append((whole, tuple(sizes)))

    def chunk(self) -> None:
        y, shape = self.pick()
        if even := [i for i, size in enumerate(shape) if size % 2 == 0]:
            halved = self.draw(st.sampled_from(even))
            sizes = tuple(size // 2 if i == halved else size for i, size in enumerate(shape))
            self.values += [(part, sizes) for part in chunks(aten.chunk.default(y, 2, halved + 1), 2)]

    def turn(self) -> None:
        y, (C, H, W) = self.pick()
        self.values.append((aten.permute.default(y, [0, 2, 3, 1]), (H, W, C)))

    def reshape(self) -> None:
        y, (C, H, W) = self.pick()
        self.values.append((aten.reshape.default(y, [-1, H, C * W, 1]), (H, C * W, 1)))

    def mean(self) -> None:
        y, (C, H, W) = self.pick()
        if H * W <= 32:
            total = aten.mul.Tensor(aten.mean.dim(y, [2, 3], True), H * W)
            self.values.append((aten.hardtanh.default(total, -8, 8), (C, 1, 1)))


CALLS = (
    Drawn.negative,
    Drawn.sum,
    Drawn.convolve,
    Drawn.concatenate,
    Drawn.chunk,
    Drawn.turn,
    Drawn.reshape,
    Drawn.mean,
)


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    """Of one input, up to fourteen calls of all these kinds, and up to three results."""

    def function(c: Any, x: Any) -> Any:
        drawn = Drawn(draw, c, x)
        for call in draw(st.lists(st.sampled_from(CALLS), min_size=3, max_size=14)):
            call(drawn)
        return tuple(drawn.pick()[0] for _ in range(draw(st.integers(1, 3))))

    graph = written(function, IMAGE, **CONSTANTS)
    graph.prune()
    return graph


# Ways in which an input [N, 4, H, W] may lie in memory.
LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a slice of something larger": lambda x: torch.cat([x.flip(1), x, x], 1)[:, 4:8],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1, :, :, :1].expand(x.shape),
}
