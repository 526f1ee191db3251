"""Convolutions of every kind by oneDNN's operators, and by plain ones, in exact integers and against float64."""

from __future__ import annotations

import pytest
import torch

from cnnfast.engine.cpu import onednn, parts, products
from cnnfast.engine.operators import ACTIVATIONS, OPERATORS
from cnnfast.engine.planning.planning import plan
from tests.support.agreement import integers, normal
from tests.support.graphs import in_float64, written

aten = torch.ops.aten
NUMBERS: dict[str | None, tuple[float, ...]] = {"hardtanh": (-0.5, 2.0), "leaky_relu": (0.25,), "elu": (0.5,)}

# x, weight, stride, padding, dilation, groups
GEOMETRIES = {
    "3x3": ((2, 8, 7, 9), (5, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "a stem of odd sizes": ((1, 3, 13, 11), (8, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "unequal taps, strides and padding": ((2, 4, 9, 8), (6, 4, 1, 5), (3, 1), (0, 2), (1, 1), 1),
    "dilated": ((1, 4, 9, 9), (4, 4, 3, 3), (1, 1), (2, 3), (2, 3), 1),
    "depthwise": ((2, 6, 8, 8), (6, 1, 3, 3), (2, 2), (1, 1), (1, 1), 6),
    "two filters a channel": ((2, 6, 8, 8), (12, 1, 5, 5), (1, 1), (2, 2), (1, 1), 6),
    "grouped": ((1, 8, 6, 6), (12, 2, 3, 3), (1, 1), (1, 1), (1, 1), 4),
    "grouped, one tap": ((1, 8, 6, 6), (8, 4, 1, 1), (1, 1), (0, 0), (1, 1), 2),
    "one tap": ((3, 8, 5, 7), (6, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one tap, one pixel": ((3, 8, 1, 1), (6, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one tap, one channel": ((2, 1, 5, 7), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one tap, stride": ((2, 8, 5, 7), (6, 8, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "one tap, padding": ((2, 8, 5, 7), (6, 8, 1, 1), (1, 1), (1, 1), (1, 1), 1),
    "one dimension": ((2, 4, 11), (6, 4, 3), (2,), (1,), (1,), 1),
    "one dimension, one tap": ((2, 4, 11), (6, 4, 1), (1,), (0,), (1,), 1),
    "three dimensions": ((2, 4, 5, 6, 7), (6, 4, 3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1),
    "three dimensions, one tap": ((2, 4, 3, 4, 5), (6, 4, 1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1),
}


@pytest.fixture(params=["oneDNN", "BLAS", "PyTorch", "in parts"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By oneDNN wherever it can, small products by BLAS, as on a machine without oneDNN, and image after image."""
    if request.param == "in parts":
        monkeypatch.setattr(parts, "LARGEST_KEPT", 0)
        monkeypatch.setattr(parts, "PART", 1)
    monkeypatch.setattr(products, "LARGEST_FOR_BLAS", 0 if request.param == "oneDNN" else 1_000_000)
    if request.param == "PyTorch":
        monkeypatch.setattr(onednn, "supports", lambda dtype: False)
    return request.param


def convolution(x, weight, bias, residual, geometry, activation, numbers):
    arguments = (x, weight, bias, residual, *map(list, geometry[:-1]), geometry[-1], activation, list(numbers))
    return x.tracer.create_proxy("call_function", OPERATORS["cnnfast.convolution"], arguments, {})


def graph_of(x_shape, weight, geometry, *, bias=None, residual="", activation=None, numbers=()):
    """A convolution. residual: "", "dead" for one that nothing reads later, "alive" for one that is a result, too."""
    constants = {"weight": weight} | ({} if bias is None else {"bias": bias})

    def function(c, x, r=None):
        added = aten.mul.Tensor(r, 2) if residual else None
        y = convolution(x, c.weight, None if bias is None else c.bias, added, geometry, activation, numbers)
        y = aten.flip.default(
            y, [1]
        )  # so that the convolution's own output is not a result, and has a place in the arena
        return (y, added) if residual == "alive" else y

    shapes = [x_shape]
    if residual:
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[weight.dim() - 3]
        shapes.append(convolve(torch.empty(x_shape, device="meta"), weight.to("meta"), None, *geometry).shape)
    return written(function, *map(tuple, shapes), dtype=weight.dtype, **constants), shapes


def run(graph, inputs):
    runner = onednn.build(plan(graph, [x.shape for x in inputs]), graph.constants)
    results = runner(inputs)
    assert all(map(torch.equal, results, runner(inputs)))
    return runner, results


@pytest.mark.parametrize("residual", ["", "dead", "alive"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_integers_are_exact(geometry, residual, served):
    x_shape, weight_shape, *rest = geometry
    for activation in (None, "relu", "hardtanh"):
        graph, shapes = graph_of(
            x_shape,
            integers(*weight_shape, seed=1),
            rest,
            bias=integers(weight_shape[0], largest=3, seed=2) if activation else None,
            residual=residual,
            activation=activation,
            numbers=NUMBERS.get(activation, ()),
        )
        inputs = [integers(*shape, largest=2, seed=i) for i, shape in enumerate(shapes)]
        _, results = run(graph, inputs)
        for mine, right in zip(results, in_float64(graph, inputs), strict=True):
            assert mine.shape == right.shape
            assert torch.equal(mine.double(), right), activation


@pytest.mark.parametrize("residual", ["", "dead", "alive"])
@pytest.mark.parametrize("geometry", ["3x3", "one tap", "depthwise"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation, geometry, residual, served):
    """Not further from float64 than what plain PyTorch computes, within a few roundings."""
    x_shape, weight_shape, *rest = GEOMETRIES[geometry]
    graph, shapes = graph_of(
        x_shape,
        normal(*weight_shape, seed=1, dtype=torch.float32),
        rest,
        bias=normal(weight_shape[0], seed=2, dtype=torch.float32),
        residual=residual,
        activation=activation,
        numbers=NUMBERS.get(activation, ()),
    )
    inputs = [normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    runner, results = run(graph, inputs)
    for mine, plain, right in zip(results, graph.run(inputs), in_float64(graph, inputs), strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (mine - right).abs().max() <= 2 * (plain - right).abs().max() + floor
    name = runner.served_by()["convolution"]
    begins = {"oneDNN": "oneDNN", "PyTorch": ("PyTorch", "matrix product")}.get(served, ("oneDNN", "matrix product"))
    assert name.startswith(begins)
    assert name.endswith(", in parts") == (served == "in parts")


@pytest.mark.parametrize("residual", ["", "dead", "alive"])
@pytest.mark.parametrize("geometry", ["3x3", "one tap"])
def test_parts_of_several_images(geometry, residual, monkeypatch):
    """Five images, two at a time: the last part is smaller."""
    (_, *size), weight_shape, *rest = GEOMETRIES[geometry]
    K, bytes_of_float = weight_shape[0], 4
    monkeypatch.setattr(parts, "LARGEST_KEPT", 0)
    monkeypatch.setattr(parts, "PART", 2 * K * size[1] * size[2] * bytes_of_float)
    weight = integers(*weight_shape, seed=1)
    graph, shapes = graph_of((5, *size), weight, rest, residual=residual, activation="relu")
    inputs = [integers(*shape, largest=2, seed=i) for i, shape in enumerate(shapes)]
    runner, results = run(graph, inputs)
    assert all(map(torch.equal, results, graph.run(inputs)))
    assert runner.served_by()["convolution"].endswith(", in parts")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", ["3x3", "one tap", "depthwise", "one tap, stride", "one dimension"])
def test_half_precision(geometry, dtype):
    x_shape, weight_shape, *rest = GEOMETRIES[geometry]
    weight = normal(*weight_shape, seed=1, dtype=dtype)
    graph, shapes = graph_of(
        x_shape, weight, rest, bias=weight.flatten(1)[:, 0].clone(), residual="dead", activation="silu"
    )
    inputs = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    runner, (mine,) = run(graph, inputs)
    (plain,), (right,) = graph.run(inputs), in_float64(graph, inputs)
    assert mine.dtype == dtype
    floor = torch.finfo(dtype).eps * right.abs().max()
    assert (mine - right).abs().max() <= 2 * (plain - right).abs().max() + floor
    assert (runner.name == "oneDNN") == onednn.supports(dtype)


@pytest.mark.parametrize("computed", ["weight", "bias"])
@pytest.mark.parametrize("operator", ["convolution", "linear"])
def test_weights_that_are_computed(operator, computed, served):
    geometry = [None, [1, 1], [1, 1], [1, 1], 1] if operator == "convolution" else []

    def function(c, x):
        given = {"weight": c.weight, "bias": c.bias}
        given[computed] = aten.mul.Tensor(given[computed], 2)
        arguments = (x, given["weight"], given["bias"], *geometry, "relu", [])
        return x.tracer.create_proxy("call_function", OPERATORS[f"cnnfast.{operator}"], arguments, {})

    taps = (3, 3) if geometry else ()
    graph = written(function, (2, 4, *taps), weight=integers(3, 4, *taps, seed=1), bias=integers(3, largest=9))
    x = integers(2, 4, *taps, seed=2)
    assert torch.equal(run(graph, [x])[1][0], graph.run([x])[0])


@pytest.mark.parametrize("shape", [(3, 8), (8,), (2, 5, 8), (2, 3, 2, 8)])
@pytest.mark.parametrize("activation", [None, "relu", "mish"])
def test_linear(shape, activation, served):
    def function(c, x):
        operator = OPERATORS["cnnfast.linear"]
        y = x.tracer.create_proxy("call_function", operator, (x, c.weight, c.bias, activation, []), {})
        return aten.flip.default(y, [0])

    graph = written(function, shape, weight=integers(6, 8, seed=1), bias=integers(6, largest=3, seed=2))
    x = integers(*shape, largest=2)
    runner, (mine,) = run(graph, [x])
    torch.testing.assert_close(mine, graph.run([x])[0], rtol=1e-6 if activation == "mish" else 0, atol=0)
    assert runner.served_by()["linear"].startswith("oneDNN matrix product" if served == "oneDNN" else "matrix product")
