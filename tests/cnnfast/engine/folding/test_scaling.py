"""Batch norms and constant factors are folded where that is exact, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cnnfast.engine.folding.folding import fold
from tests.support.agreement import integers, normal
from tests.support.graphs import called, exactly_folded, in_float64, relative_error, written

aten = torch.ops.aten

IMAGE = (None, 4, None, None)
X = integers(3, 4, 6, 5, largest=3)


def statistics(channels: int) -> dict[str, Tensor]:
    """Of a batch norm, so that every result is a whole number or a simple fraction."""
    named = {name: integers(channels, largest=2, seed=i) for i, name in enumerate(("gamma", "beta", "mean"))}
    return named | {"var": torch.tensor([0.25, 1, 4, 16]).repeat(channels)[:channels]}


def norm(c, y, training=False):
    return aten.batch_norm.default(y, c.gamma, c.beta, c.mean, c.var, training, 0.1, 0.0, False)


def convolve(c, x, padding=1, groups=1, stride=1):
    return aten.conv2d.default(x, c.w, c.b, [stride, stride], [padding, padding], [1, 1], groups)


FILTERS = {"w": integers(4, 4, 3, 3, seed=7), "b": integers(4, seed=8)}
GROUPED = {"w": integers(8, 2, 3, 3, seed=7), "b": integers(8, seed=8)}
FACTORS = {"scale": integers(4, 1, 1, largest=3, seed=9), "shift": integers(1, 4, 1, 1, largest=3, seed=10)}


@pytest.mark.parametrize(
    ("network", "constants"),
    [
        (lambda c, x: norm(c, convolve(c, x)), FILTERS | statistics(4)),
        (lambda c, x: norm(c, convolve(c, x, groups=2)), GROUPED | statistics(8)),
        (lambda c, x: norm(c, norm(c, convolve(c, x))), FILTERS | statistics(4)),
        (
            lambda c, x: aten.batch_norm.default(convolve(c, x), None, None, c.mean, c.var, False, 0.1, 0.0, False),
            FILTERS | statistics(4),
        ),
        (lambda c, x: aten.mul.Tensor(convolve(c, x), c.scale), FILTERS | FACTORS),
        (lambda c, x: aten.mul.Tensor(c.scale, convolve(c, x)), FILTERS | FACTORS),
        (lambda c, x: aten.add.Tensor(convolve(c, x), c.shift, alpha=2), FILTERS | FACTORS),
        (lambda c, x: aten.add.Tensor(c.shift, convolve(c, x), alpha=2), FILTERS | FACTORS),
        (lambda c, x: aten.sub.Tensor(convolve(c, x), c.shift, alpha=3), FILTERS | FACTORS),
        (lambda c, x: aten.sub.Tensor(c.shift, convolve(c, x), alpha=3), FILTERS | FACTORS),
        (lambda c, x: aten.rsub.Scalar(convolve(c, x), 5, 2), FILTERS),
        (lambda c, x: aten.neg.default(convolve(c, x)), FILTERS),
        (lambda c, x: aten.div.Tensor(aten.add.Tensor(aten.mul.Tensor(convolve(c, x), 3), 1), 4.0), FILTERS),
    ],
)
def test_what_follows_a_convolution_is_in_its_weights(network, constants):
    assert called(exactly_folded(written(network, IMAGE, **constants), X)) == {"cnnfast.convolution": 1}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_what_follows_a_transposed_convolution_is_in_its_weights(groups, dims):
    """Its weight is [C, K / groups, *taps]."""
    transposed = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[dims - 1]

    def network(c, x):
        return norm(c, transposed(x, c.w, None, [2] * dims, [1] * dims, [0] * dims, groups, [1] * dims))

    weight = integers(4, 6 // groups, *[3] * dims)
    graph = written(network, (None, 4, *[None] * dims), w=weight, **statistics(6))
    folded = exactly_folded(graph, integers(2, 4, *[4] * dims, seed=3))
    assert sum(called(folded).values()) == 1


@pytest.mark.parametrize(
    ("network", "calls"),
    [
        # of two users the other wants what the convolution gives
        (lambda c, x: (y := convolve(c, x), norm(c, y)), {"cnnfast.convolution": 1, "cnnfast.affine": 1}),
        # statistics of the batch
        (lambda c, x: norm(c, convolve(c, x), training=True), {"cnnfast.convolution": 1, "aten.batch_norm.default": 1}),
        # a number for each column, and one for each place
        (lambda c, x: aten.mul.Tensor(convolve(c, x), c.row), {"cnnfast.convolution": 1, "aten.mul.Tensor": 1}),
        # a number over a convolution's result
        (
            lambda c, x: aten.div.Tensor(c.scale, aten.add.Tensor(convolve(c, x), 100)),
            {"cnnfast.convolution": 1, "aten.div.Tensor": 1},
        ),
        # the constant makes five dimensions of four
        (lambda c, x: aten.mul.Tensor(convolve(c, x), c.five), {"cnnfast.convolution": 1, "aten.mul.Tensor": 1}),
    ],
)
def test_what_is_not_folded(network, calls):
    constants = FILTERS | FACTORS | statistics(4) | {"row": integers(6), "five": integers(1, 1, 4, 1, 1)}
    graph = written(network, (None, 4, None, 6), **constants)
    x = normal(3, 4, 5, 6, dtype=torch.float32)
    folded = fold(graph, torch.float32)
    assert called(folded) == calls
    for ours, right in zip(folded.run([x]), in_float64(graph, [x]), strict=True):
        assert relative_error(ours, right) < 1e-6


def test_one_channel_becomes_many():
    """A constant that enlarges the result is no factor of the channels."""
    network = lambda c, x: aten.mul.Tensor(aten.conv2d.default(x, c.w, None), c.scale)  # noqa: E731
    graph = written(network, IMAGE, w=integers(1, 4, 1, 1), scale=integers(4, 1, 1, seed=2))
    assert called(exactly_folded(graph, X)) == {"cnnfast.convolution": 1, "aten.mul.Tensor": 1}


PREPARED = {"mean": integers(1, 4, 1, 1, largest=3), "std": torch.tensor([0.5, 0.25, 2, 1]).reshape(1, 4, 1, 1)}


def test_preprocessing_in_the_network_stays_before_padding_and_is_folded_where_there_is_none():
    """A border of zeros comes after the mean was subtracted, and would come before it. What only divides may be folded
    all the same.
    """

    def network(c, x, padding):
        return convolve(c, aten.div.Tensor(aten.sub.Tensor(x, c.mean), c.std), padding)

    for padding, calls in ((0, {"cnnfast.convolution": 1}), (1, {"cnnfast.convolution": 1, "aten.sub.Tensor": 1})):
        graph = written(lambda c, x, p=padding: network(c, x, p), IMAGE, **FILTERS, **PREPARED)
        assert called(exactly_folded(graph, X)) == calls


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_factors_alone_are_folded_before_padding_too(groups):
    def network(c, x):
        y = aten.mul.Tensor(aten.relu.default(x), c.scale)
        return convolve(c, y, groups=groups), convolve(c, y, stride=2, groups=groups)

    filters = {"w": integers(8, 4 // groups, 3, 3), "b": integers(8, seed=5)}
    folded = exactly_folded(written(network, IMAGE, **filters, scale=FACTORS["scale"]), X)
    assert called(folded) == {"cnnfast.convolution": 2, "aten.relu.default": 1}


def test_a_factor_stays_if_one_user_cannot_take_it():
    def network(c, x):
        y = aten.mul.Tensor(x, c.scale)
        return convolve(c, y), aten.relu.default(y)

    folded = exactly_folded(written(network, IMAGE, **FILTERS, scale=FACTORS["scale"]), X)
    assert called(folded) == {"cnnfast.convolution": 1, "aten.mul.Tensor": 1, "aten.relu.default": 1}


MATRIX = {"w": integers(4, 5), "b": integers(4, seed=1)}


def test_what_follows_a_matrix_product():
    def network(c, x):
        return norm(c, aten.mul.Tensor(aten.linear.default(x, c.w, c.b), c.factors))

    graph = written(network, (None, 5), **MATRIX, **statistics(4), factors=integers(4, largest=3, seed=2))
    assert called(exactly_folded(graph, integers(3, 5))) == {"cnnfast.linear": 1}


def test_the_channels_of_a_product_of_three_dimensions_are_the_last():
    """A batch norm of [N, C, L] normalises the second dimension, whatever the sizes."""

    def network(c, x):
        return norm(c, aten.linear.default(x, c.w, c.b))

    graph = written(network, (None, 4, 5), **MATRIX, **statistics(4))
    assert called(exactly_folded(graph, integers(3, 4, 5))) == {"cnnfast.linear": 1, "cnnfast.affine": 1}


@pytest.mark.parametrize("spelling", ["permute", "transpose"])
def test_a_layer_scale_behind_a_permutation(spelling):
    """As ConvNeXt has it: a product with channels last, and the factors [C, 1, 1] with channels first."""

    def network(c, x):
        y = aten.linear.default(aten.permute.default(x, [0, 2, 3, 1]), c.w, c.b)
        if spelling == "permute":
            y = aten.permute.default(y, [0, 3, 1, 2])
        else:
            y = aten.transpose.int(aten.transpose.int(y, 3, 1), -1, -2)
        return aten.mul.Tensor(y, c.scale)

    graph = written(network, (None, 5, None, None), **MATRIX, scale=FACTORS["scale"])
    calls = called(exactly_folded(graph, integers(3, 5, 4, 4)))
    assert calls["cnnfast.linear"] == 1
    assert "aten.mul.Tensor" not in calls


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_batch_norm_after_no_convolution(rank):
    graph = written(lambda c, x: norm(c, aten.relu.default(x)), (None, 4, *[None] * (rank - 2)), **statistics(4))
    folded = exactly_folded(graph, integers(3, 4, *[5] * (rank - 2), largest=4))
    assert called(folded) == {"aten.relu.default": 1, "cnnfast.affine": 1}


def test_scales_that_half_precision_cannot_hold_stay_apart():
    """1e-6 is what ConvNeXt's factors begin with; products of it with weights are nothing in float16."""

    def network(c, x):
        return aten.mul.Tensor(aten.conv2d.default(x, c.w, c.b), c.scale)

    weights = {"w": normal(4, 4, 1, 1) * 0.02, "b": normal(4, seed=1), "scale": torch.full((4, 1, 1), 1e-6)}
    for large in (1.0, 1e6):
        constants = {**weights, "scale": weights["scale"] * large**2, "w": weights["w"]}
        graph = written(network, IMAGE, **{name: t.float() for name, t in constants.items()})
        assert called(fold(graph, torch.float16)) == {"cnnfast.convolution": 1, "aten.mul.Tensor": 1}
        assert called(fold(graph, torch.float32)) == {"cnnfast.convolution": 1}


def test_weights_are_rounded_once():
    """Three factors in a row: each rounding on the way would leave its mark."""

    def network(c, x):
        return aten.mul.Tensor(aten.mul.Tensor(norm(c, convolve(c, x)), c.scale), 1 / 3)

    constants = {name: normal(*t.shape, seed=i, dtype=torch.float32) for i, (name, t) in enumerate(FILTERS.items())}
    constants |= {name: t + 0.1 for name, t in statistics(4).items()} | {"scale": normal(4, 1, 1).float()}
    graph = written(network, IMAGE, **constants)
    for dtype in (torch.float32, torch.bfloat16):
        folded = fold(graph, dtype)
        (conv,) = [node for node in folded.calls.nodes if node.op == "call_function"]
        c = {name: t.double() for name, t in constants.items()}
        factor = c["gamma"] / c["var"].sqrt() * c["scale"].flatten() / 3
        weight = folded.constant(conv.args[1])
        assert weight is not None
        assert torch.equal(weight, (c["w"] * factor.reshape(-1, 1, 1, 1)).to(dtype))
