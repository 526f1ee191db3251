"""What follows from constants is computed once, in float64, and every constant is rounded once."""

from __future__ import annotations

import torch

from cnnfast.engine.folding.folding import fold
from cnnfast.engine.graph import Input
from tests.support.agreement import integers, normal
from tests.support.graphs import called, exactly_folded, written

aten = torch.ops.aten

IMAGE = (None, 4, None, None)


def test_standardised_weights_are_computed_in_float64():
    """As NFNet and BiT have them: by a batch norm of the weights in training mode."""

    def network(c, x):
        flat = aten.reshape.default(c.w, [1, 8, -1])
        flat = aten.batch_norm.default(flat, c.gain, None, None, None, True, 0.0, 1e-6, False)
        return aten.conv2d.default(x, aten.reshape.default(flat, [8, 4, 3, 3]))

    w, gain = normal(8, 4, 3, 3).float() + 10, normal(8, seed=1).float()
    folded = fold(written(network, IMAGE, w=w, gain=gain), torch.float32)
    assert called(folded) == {"cnnfast.convolution": 1}
    (weight,) = (value for value in folded.constants.values() if value.dim() == 4)
    exact = w.double()
    var, mean = torch.var_mean(exact, (1, 2, 3), correction=0, keepdim=True)
    right = (exact - mean) / (var + 1e-6).sqrt() * gain.double().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(weight.double(), right, rtol=1e-7, atol=1e-9)
    assert {*folded.constants.values()} == {weight}  # what it was made of is gone


def test_parts_of_constants_sizes_and_indices():
    """A call may give several tensors, or a number, and the tensors may be of integers."""

    def network(c, x):
        first, second = (aten.chunk.default(c.table, 2)[i] for i in range(2))
        rows = aten.index.Tensor(c.table, [c.index])
        count = aten.sym_size.int(c.table, 0)
        return aten.add.Tensor(aten.mul.Tensor(x, aten.add.Tensor(first, second)), rows), aten.add.Tensor(x, count)

    graph = written(network, (None, 2, 4), table=integers(4, 4), index=torch.tensor([3, 1]))
    folded = exactly_folded(graph, integers(3, 2, 4, seed=1))
    assert called(folded) == {"aten.mul.Tensor": 1, "aten.add.Tensor": 2}


def test_what_depends_on_no_input_is_a_constant():
    network = lambda c, x: (x, aten.mul.Tensor(aten.arange.default(4), c.two))  # noqa: E731
    folded = fold(written(network, (None, 4), two=torch.tensor(2.0)), torch.float32)
    assert not called(folded)
    assert torch.equal(folded.run([torch.ones(1, 4)])[1], torch.arange(4) * 2.0)


def test_half_precision_is_rounded_from_float64_and_integers_stay():
    def network(c, x):
        return aten.mul.Tensor(x, aten.div.Tensor(c.third, 3)), aten.index.Tensor(c.third, [c.index])

    graph = written(network, (None, 2), third=torch.tensor([1.0, 2.0]), index=torch.tensor([1]))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        folded = fold(graph, dtype)
        assert folded.inputs == (Input("x0", (None, 2), dtype),)
        result = folded.run([torch.ones(1, 2, dtype=dtype)])
        assert torch.equal(result[0], torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64).to(dtype))
        assert result[1].dtype == dtype
    assert graph.inputs[0].dtype == torch.float32


def test_an_input_of_integers_stays_one():
    def network(c, x, index):
        return aten.embedding.default(c.table, index), x

    graph = written(network, (None, 2), (None, 3), table=integers(4, 4))
    graph.inputs = (graph.inputs[0], Input("x1", (None, 3), torch.int64))
    folded = fold(graph, torch.bfloat16)
    assert [given.dtype for given in folded.inputs] == [torch.bfloat16, torch.int64]
    rows, _ = folded.run([torch.ones(1, 2).bfloat16(), torch.tensor([[1, 2, 3]])])
    assert torch.equal(rows[0], integers(4, 4)[1:].bfloat16())


def test_constants_have_the_dtype_of_the_values_that_they_meet():
    """A network that computes a part in float32 whatever it is run in, with one weight for both parts."""

    def network(c, x):
        y = aten.linear.default(x, c.w, c.b)
        return y, aten.linear.default(aten.to.dtype(x, torch.float32), c.w, c.b)

    w, b = normal(3, 4).float(), normal(3, seed=1).float()
    folded = fold(written(network, (None, 4), w=w, b=b), torch.bfloat16)
    x = normal(2, 4, seed=3).bfloat16()
    y, z = folded.run([x])
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(z.double(), x.double() @ w.double().T + b.double(), rtol=1e-6, atol=1e-6)


def test_constants_of_another_dtype_than_the_rest_keep_it():
    """A network in bfloat16 that normalises in float32, by float32 parameters."""

    def network(c, x):
        y = aten.linear.default(x, c.w)
        return y, aten.mul.Tensor(aten.to.dtype(y, torch.float32), c.wide)

    wide = normal(3, seed=2).float()
    graph = written(network, (None, 4), dtype=torch.bfloat16, w=normal(3, 4).bfloat16(), wide=wide)
    folded = fold(graph, torch.bfloat16)
    assert torch.equal(folded.constants["wide"], wide)
    x = normal(2, 4, seed=3).bfloat16()
    for ours, right in zip(folded.run([x]), graph.run([x]), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


def test_the_example_is_tried_first():
    """Of a network that takes no usual size, constants meet values of a dtype that is known all the same."""

    def network(c, x):
        return aten.linear.default(aten.to.dtype(aten.reshape.default(x, [-1, 11]), torch.float32), c.w)

    graph = written(network, (None, None, None), w=normal(3, 11).float())
    graph.conditions = ("size(0, 1) * size(0, 2) == 11",)
    x = normal(2, 11, 1).bfloat16()
    assert fold(graph, torch.bfloat16, ((2, 11, 1),)).run([x])[0].dtype == torch.float32
