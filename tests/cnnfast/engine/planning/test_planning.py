"""What a plan says of a graph: shapes, layouts, who shares memory with whom, and which sizes are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cnnfast.engine.graph import Graph
from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.plan import Plan, Ref, Step, Value
from cnnfast.engine.planning.planning import plan
from tests.support.graphs import written
from tests.support.planned import CASES, CONSTANTS, chunks, convolve, graph_of, negative, ours

aten = torch.ops.aten


def planned(function: Callable[..., Any], *shapes: tuple[int, ...], **constants: torch.Tensor) -> Plan:
    """The plan of a graph that takes any number of images of these shapes."""
    graph = written(function, *[(None, *shape[1:]) for shape in shapes], **(constants or CONSTANTS))
    graph.prune()
    return plan(graph, shapes)


def steps(made: Plan, operator: str) -> list[Step]:
    return [step for step in made.steps if step.operator == operator]


def output(made: Plan, step: Step) -> Value:
    return made.values[step.outputs[0]]


def sized(name: str, size: Any, *numbers: Any) -> Any:
    """A call of one of Python's operators on a size."""
    return size.tracer.create_proxy("call_function", OPERATORS[f"python.{name}"], (size, *numbers), {})


X = (2, 4, 4, 8)


# ----------------------------------------------------------------------------------------------------------------------
# Layouts


def test_images_are_channels_last():
    """Also where PyTorch would give another layout: behind a shuffle of channels, whose copy is row after row."""
    made = plan(graph_of("shuffle"), [X])
    last = steps(made, "aten.reshape.default")[-1]
    assert not last.is_view
    assert (
        output(made, last).stride == output(made, made.steps[-1]).stride == made.values["x0"].stride == (128, 1, 32, 4)
    )


def test_four_dimensions_are_not_always_an_image():
    """Rows of features stay rows, as layers and products want them, whatever the number of dimensions."""

    def function(c, x):
        y = aten.permute.default(x, [0, 2, 3, 1])
        y = aten.linear.default(y, c.weight)
        return aten.permute.default(aten.relu.default(y), [0, 3, 1, 2])

    made = planned(function, X, weight=torch.ones(16, 4))
    rows = output(made, steps(made, "aten.linear.default")[0])
    assert (rows.shape, rows.stride) == ((2, 4, 8, 16), (512, 128, 16, 1))
    assert made.values[made.results[0]].stride == (512, 1, 128, 16)
    assert [step.is_view for step in made.steps] == [True, False, False, True]


def test_sizes_are_numbers_in_a_plan():
    def function(c, x):
        n = sized("mul", aten.sym_size.int(x, 0), 4)
        return aten.relu.default(aten.reshape.default(x, [n, 32]))

    made = planned(function, X)
    assert [step.operator for step in made.steps] == ["aten.reshape.default", "aten.relu.default"]
    assert made.steps[0].args == (Ref("x0"), [8, 32])


def test_a_plan_touches_no_weight():
    graph = graph_of("residual_blocks")
    on_meta = Graph(graph.calls, {name: t.to("meta") for name, t in graph.constants.items()}, graph.inputs)
    assert plan(on_meta, [X]) == plan(graph, [X])


def test_a_constant_may_have_the_name_of_an_input():
    def function(c, x):
        return aten.add.Tensor(x, c.x0)

    made = planned(function, X, x0=torch.ones(4, 1, 1))
    (name,) = made.inputs
    assert name != "x0"
    assert steps(made, "aten.add.Tensor")[0].args == (Ref(name), Ref("x0"))


# ----------------------------------------------------------------------------------------------------------------------
# Views


def test_views_lie_in_what_they_are_views_of_and_keep_it_alive():
    made = plan(graph_of("views"), [X])
    first = steps(made, "cnnfast.convolution")[0].outputs[0]
    view = steps(made, "aten.reshape.default")[0]
    assert view.is_view
    assert made.values[view.outputs[0]].buffer == made.values[first].buffer == first
    assert made.buffers[first].last >= made.steps.index(steps(made, "aten.add.Tensor")[0])


def test_a_reshape_that_no_strides_can_give_is_a_copy():
    made = planned(lambda c, x: aten.mul.Tensor(aten.flatten.using_ints(aten.relu.default(x), 1), 2), X)
    (flat,) = steps(made, "aten.flatten.using_ints")
    assert not flat.is_view
    assert output(made, flat).buffer == flat.outputs[0]


def test_parts_of_a_value_are_outputs_of_one_step():
    def function(c, x):
        left, right = chunks(aten.chunk.default(aten.relu.default(x), 2, 1), 2)
        return aten.add.Tensor(left, right)

    made = planned(function, X)
    assert [step.operator for step in made.steps] == ["aten.relu.default", "aten.chunk.default", "aten.add.Tensor"]
    left, right = (made.values[name] for name in made.steps[1].outputs)
    assert (left.offset, right.offset, left.stride, left.buffer) == (0, 2, right.stride, "relu_default")
    assert made.steps[2].args[:2] == (Ref(left.name), Ref(right.name))


def test_several_outputs_that_are_computed():
    def function(c, x):
        values, indices = chunks(aten.topk.default(x, 2, 3), 2)
        return values, aten.mul.Tensor(indices, 2)

    made = planned(function, X)
    (step,) = steps(made, "aten.topk.default")
    values, indices = (made.values[name] for name in step.outputs)
    assert (values.shape, values.dtype, indices.dtype) == ((2, 4, 4, 2), torch.float32, torch.int64)
    assert (values.buffer, indices.buffer) == step.outputs
    assert made.results[0] == values.name


def test_a_view_of_a_constant_is_computed():
    made = planned(lambda c, x: aten.add.Tensor(x, aten.permute.default(c.image, [0, 1, 3, 2])), (2, 4, 8, 4))
    assert not steps(made, "aten.permute.default")[0].is_view


# ----------------------------------------------------------------------------------------------------------------------
# Concatenations


def test_a_dense_block_shares_one_buffer_and_copies_nothing():
    made = plan(graph_of("dense_block"), [X])
    wholes = [output(made, step) for step in steps(made, "aten.cat.default")]
    assert all(step.is_view and not step.pieces for step in steps(made, "aten.cat.default"))
    assert {whole.buffer for whole in wholes} == {wholes[-1].name}
    assert [(whole.shape[1], whole.stride, whole.offset) for whole in wholes] == [
        (C, (16 * 32, 1, 8 * 16, 16), 0) for C in (4, 8, 12, 16)
    ]
    parts = [output(made, step) for step in steps(made, "cnnfast.convolution")]
    assert [part.offset for part in parts] == [0, 4, 8, 12]
    assert {part.buffer for part in parts} == {wholes[-1].name}
    assert made.buffers[wholes[-1].name].first == 0


def test_parts_that_are_not_made_for_a_concatenation_are_copied():
    """Inputs, constants, what stands there twice, and what lies in another."""
    made = plan(graph_of("branches"), [X])
    one, flat, more, twice = steps(made, "aten.cat.default")
    a, b = steps(made, "cnnfast.convolution")[0].outputs[0], steps(made, "aten.relu.default")[0].outputs[0]
    assert made.values[a].buffer == output(made, one).buffer  # the first that asks for it has it
    assert [(p.part, p.place.offset) for p in one.pieces] == [("x0", 4), (b, 8), (b, 12)]
    assert not flat.pieces
    assert [p.part for p in more.pieces] == ["image"]
    assert [p.part for p in twice.pieces] == [a, a]
    assert [step.is_view for step in (one, flat, more, twice)] == [False, True, False, False]
    assert all(piece.place.buffer == output(made, one).buffer for piece in one.pieces)


def test_a_view_is_copied_into_a_concatenation():
    made = plan(graph_of("shuffle"), [X])
    left, _ = steps(made, "aten.chunk.default")[0].outputs
    (step,) = steps(made, "aten.cat.default")
    assert [(p.part, p.place.shape, p.place.offset) for p in step.pieces] == [(left, (2, 2, 4, 8), 0)]
    assert output(made, steps(made, "aten.relu.default")[0]).offset == 2


def test_a_part_of_another_dtype_is_copied():
    def function(c, x):
        return aten.cat.default([aten.relu.default(x), aten.mul.Tensor(c.numbers, 2)], 1)

    made = planned(function, X, numbers=torch.ones(2, 4, 4, 8, dtype=torch.int32))
    (step,) = steps(made, "aten.cat.default")
    assert [piece.part for piece in step.pieces] == [steps(made, "aten.mul.Tensor")[0].outputs[0]]


def test_a_result_is_not_put_into_a_concatenation():
    def function(c, x):
        y = aten.relu.default(x)
        return y, aten.cat.default([negative(x), y], 1)

    made = planned(function, X)
    assert made.values[made.results[0]].buffer == made.results[0]
    assert made.buffers[made.results[0]].bytes == made.values[made.results[0]].bytes


def test_an_empty_part_of_one_dimension_counts_for_nothing():
    def function(c, x):
        return aten.cat.default([c.nothing, aten.relu.default(x), negative(x)], 1)

    made = planned(function, X, nothing=torch.ones(0))
    (step,) = steps(made, "aten.cat.default")
    assert step.is_view
    second = output(made, steps(made, "aten.mul.Tensor")[0])
    assert second.offset == 4 * second.stride[1]


def test_concatenations_in_concatenations_need_no_copy():
    made = plan(graph_of("nested"), [X])
    assert all(step.is_view for step in steps(made, "aten.cat.default"))
    assert made.arena == 0


# ----------------------------------------------------------------------------------------------------------------------
# What is written over an argument that ends


def test_a_chain_of_element_wise_steps_has_one_buffer():
    def function(c, x):
        y = aten.hardswish.default(aten.relu.default(ours("affine", negative(x), c.scale, c.scale, None, None, [])))
        return aten.mean.dim(y, [2, 3])

    made = planned(function, X)
    assert [step.overwrites for step in made.steps[:4]] == ["", *(step.outputs[0] for step in made.steps[:3])]
    assert made.arena == made.buffers[made.steps[0].outputs[0]].bytes == 4 * 2 * 4 * 4 * 8
    assert (made.buffers[made.steps[0].outputs[0]].first, made.buffers[made.steps[0].outputs[0]].last) == (0, 4)


def test_a_convolution_adds_onto_its_residual():
    made = plan(graph_of("residual_blocks"), [X])
    convolutions = steps(made, "cnnfast.convolution")
    sums = [convolutions[i].overwrites for i in (1, 3, 5)]
    assert sums == ["", convolutions[1].outputs[0], convolutions[3].outputs[0]]  # the first is the network's input
    assert len({output(made, convolutions[i]).buffer for i in (1, 3, 5)}) == 1


KEPT = {
    "it is read again": lambda c, x: (lambda y: aten.add.Tensor(negative(y), aten.sigmoid.default(y)))(negative(x)),
    "it is read through a view": lambda c, x: (
        lambda y: aten.add.Tensor(negative(y), aten.reshape.default(y, [-1, 4, 4, 8]))
    )(negative(x)),
    "it is the input": lambda c, x: aten.relu.default(negative(x)),
    "it is a result": lambda c, x: (lambda y: (y, aten.relu.default(y)))(negative(x)),
    "it is smaller": lambda c, x: aten.add.Tensor(aten.mean.dim(negative(x), [2, 3], True), c.image),
    "its dtype is another": lambda c, x: aten.mul.Tensor(aten.gt.Scalar(negative(x), 0), 2.0),
    "it is a part of something": lambda c, x: negative(chunks(aten.chunk.default(negative(x), 2, 1), 2)[0]),
    "its elements are turned": lambda c, x: aten.sub.Tensor(
        *(lambda y: (y, aten.permute.default(y, [0, 2, 1, 3])))(negative(x))
    ),
    "the convolution reads it": lambda c, x: (lambda y: convolve(y, c.square, y))(negative(x)),
    "the step is not element-wise": lambda c, x: aten.softmax.int(negative(x), 1),
}


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT.keys())
def test_what_is_still_needed_is_not_written_over(function):
    """The first step negates the input; nothing may be written over its output by the next that reads it."""
    made = planned(function, (1, 4, 4, 8))
    assert made.steps[0].operator == "aten.mul.Tensor"
    kept = {made.steps[0].outputs[0], made.inputs[0]}
    views = {name for step in made.steps if step.is_view for name in step.outputs}
    reading = [step for step in made.steps[1:] if not step.is_view]
    if function is KEPT["it is the input"]:
        assert made.steps[0].overwrites == ""
    else:
        assert reading[0].overwrites not in kept | views


def test_a_value_that_ends_in_two_places_of_one_step_is_written_over():
    made = planned(lambda c, x: ours("sum", *[negative(x)] * 2, None, []), X)
    assert made.steps[1].overwrites == made.steps[0].outputs[0]


# ----------------------------------------------------------------------------------------------------------------------
# Results


def test_results_that_are_not_whole_values_are_copied():
    made = plan(graph_of("awkward_results"), [X])
    copied = {step.args[0].name for step in steps(made, "aten.clone.default")}
    x, image, a, again, left, flat, input_flat, _, right = made.results
    parts = steps(made, "aten.chunk.default")[0].outputs
    flattened = steps(made, "aten.flatten.using_ints")
    assert copied == {"x0", "image", *parts}
    assert a == again == steps(made, "aten.relu.default")[0].outputs[0]
    assert flat == flattened[0].outputs[0]
    assert input_flat == flattened[1].outputs[0]
    for result in made.results:
        value = made.values[result]
        buffer = made.buffers[value.buffer]
        assert (buffer.address, buffer.last, buffer.bytes) == (None, len(made.steps), value.bytes)
        assert value.buffer not in made.inputs
    assert len({made.values[name].buffer for name in (x, image, a, left, right)}) == 5


def test_a_result_that_is_the_beginning_of_a_value_is_copied():
    """It has no gaps, but returning it would keep the other images, too."""
    made = planned(lambda c, x: chunks(aten.chunk.default(aten.relu.default(x), 2, 0), 2)[0], X)
    assert made.steps[-1].operator == "aten.clone.default"
    assert made.buffers[made.results[0]].bytes == 4 * 4 * 4 * 8


def test_a_result_that_repeats_elements_is_copied():
    made = planned(lambda c, x: aten.expand.default(aten.mean.dim(x, [2, 3], True), [2, 4, 4, 8]), X)
    assert made.steps[-1].operator == "aten.clone.default"


# ----------------------------------------------------------------------------------------------------------------------
# Sizes that are refused

REFUSED = {
    "too few inputs": ([], r"takes 1 tensors \(x0\), got 0"),
    "too many inputs": ([X, X], r"takes 1 tensors \(x0\), got 2"),
    "a dimension too few": ([X[1:]], r"x0: this network takes \[any, 4, 4, 8\], got \(4, 4, 8\)"),
    "a fixed size": ([(2, 4, 4, 9)], r"x0: this network takes \[any, 4, 4, 8\], got \(2, 4, 4, 9\)"),
    "a negative size": ([(-1, 4, 4, 8)], r"x0: this network takes \[any, 4, 4, 8\], got \(-1, 4, 4, 8\)"),
}


@pytest.mark.parametrize(("shapes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_shapes_that_an_input_cannot_have(shapes, message):
    with pytest.raises(ValueError, match=message):
        plan(graph_of("residual_blocks"), shapes)


def test_a_condition_that_is_not_met():
    graph = written(lambda c, x: aten.relu.default(x), (None, 3, None, None))
    graph.conditions = ("size(0, 2) >= 3",)
    plan(graph, [(1, 3, 3, 1)])
    with pytest.raises(ValueError, match=r"does not take such sizes.*\(1, 3, 2, 9\).*size\(0, 2\) >= 3"):
        plan(graph, [(1, 3, 2, 9)])


def test_an_image_that_is_too_small():
    def function(c, x):
        for _ in range(2):
            x = aten.conv2d.default(x, c.weight, None, [2, 2])
        return aten.mean.dim(x, [2, 3])

    graph = written(function, (None, 3, None, None), weight=torch.ones(3, 3, 3, 3))
    plan(graph, [(1, 3, 7, 7)])
    message = (
        r"cannot take x0 of shape \(1, 3, 7, 6\): conv2d_default_1 \(aten.conv2d.default\) fails.*x0 \[any, 3, any"
    )
    with pytest.raises(ValueError, match=message):
        plan(graph, [(1, 3, 7, 6)])


def product(c: Any, x: Any) -> Any:
    n = aten.sym_size.int(x, 1)
    for _ in range(8):
        n = sized("mul", n, n)
    return aten.reshape.default(x, [n, -1])


HOSTILE = {
    "a large value": lambda c, x: aten.expand.default(c.one, [1 << 20, 1 << 20]),
    "a large view": lambda c, x: aten.sum.default(
        aten.expand.default(aten.reshape.default(x, [256, 1]), [256, 1 << 32])
    ),
    "a value that no number counts": lambda c, x: aten.expand.default(c.one, [1 << 40, 1 << 40]),
    "a large number": product,
    "many parts": lambda c, x: chunks(aten.unbind.int(aten.expand.default(c.one, [1 << 24])), 1)[0],
    "many values": lambda c, x: aten.cat.default([negative(aten.expand.default(c.one, [1 << 24])) for _ in range(20)]),
}


@pytest.mark.parametrize("function", HOSTILE.values(), ids=HOSTILE.keys())
def test_sizes_that_a_foreign_file_may_name(function):
    with pytest.raises(ValueError, match=r"fails with such sizes|would need \d+ bytes"):
        planned(function, X, one=torch.ones(1))


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_a_plan_is_plain_data(name):
    """Steps run in the order in which their arguments are made, and every place lies within its buffer."""
    graph = graph_of(name)
    made = plan(graph, [X] * len(graph.inputs))
    there = {*made.inputs, *graph.constants}
    for index, step in enumerate(made.steps):
        for value in (made.values[output] for output in step.outputs):
            last = value.offset + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride, strict=True))
            assert (last + 1) * value.dtype.itemsize <= made.buffers[value.buffer].bytes
            assert made.buffers[value.buffer].first <= index <= made.buffers[value.buffer].last
        assert {argument.name for argument in step.args if isinstance(argument, Ref)} <= there
        there |= {*step.outputs}
    assert eval(repr(made.buffers).replace("Buffer(", "dict("))  # numbers and names only
