"""What models write as sums and activations is read as what it computes."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnfast import patterns
from cnnfast.activations import ACTIVATIONS, activate
from cnnfast_kernels import activations

WRITTEN = [(name, callee) for name, callees in patterns.ACTIVATIONS.items() for callee in callees]


def called(callee, *options, **named):
    """A module that calls a function, or a method by its name, with these arguments after its own."""

    class Calls(nn.Module):
        def forward(self, x):
            if isinstance(callee, str):
                return getattr(x, callee)(*options, **named)
            return callee(x, *options, **named)

    return Calls()


def the_call(module: nn.Module) -> torch.fx.Node:
    traced = torch.fx.symbolic_trace(module)
    (node,) = [node for node in traced.graph.nodes if node.op.startswith("call")]
    return node


@pytest.mark.parametrize(("name", "callee"), WRITTEN, ids=lambda value: getattr(value, "__name__", value))
def test_an_activation_computes_what_its_name_says(name, callee):
    x = torch.linspace(-8, 8, 65)
    if isinstance(callee, type):
        module = callee()
        found = patterns.activation_of(module)
    else:
        module = called(callee)
        found = patterns.called_activation(the_call(module))
    assert found is not None
    arguments = {"leaky_relu": 0.01, "prelu": getattr(module, "weight", None)}
    assert found[0] == name
    assert found[1] is arguments.get(name) or found[1] == arguments.get(name)
    assert torch.equal(module(x.clone()), activate(x, *filter(lambda value: value is not None, found)))


def test_all_names_are_known_to_the_kernels_and_to_the_paths_of_pytorch():
    assert {*patterns.ACTIVATIONS, "gelu_tanh"} <= set(activations.ACTIVATIONS) & set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (called(F.leaky_relu, 0.3), ("leaky_relu", 0.3)),
        (called(F.leaky_relu, negative_slope=1), ("leaky_relu", 1.0)),
        (called(F.leaky_relu, 0.3, inplace=True), ("leaky_relu", 0.3)),
        (called(F.gelu, approximate="tanh"), ("gelu_tanh", None)),
        (called(F.relu, inplace=True), ("relu", None)),
        (called(F.relu, True), ("relu", None)),
        (called(F.sigmoid), None),
        (called(F.max_pool2d, 2), None),
    ],
)
def test_options_of_a_call(module, activation):
    assert patterns.called_activation(the_call(module)) == activation


def test_modules_of_other_classes_are_not_read():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    assert patterns.activation_of(Shifted()) is None
    assert patterns.activation_of(nn.LeakyReLU(0.3)) == ("leaky_relu", 0.3)
    assert patterns.activation_of(nn.GELU("tanh")) == ("gelu_tanh", None)
    assert patterns.activation_of(nn.Sigmoid()) is None


@pytest.mark.parametrize("node_is", ["Shifted", "Sigmoid", "F.sigmoid", "sigmoid", "F.relu"])
def test_an_activation_is_one_whether_or_not_kernels_know_it(node_is):
    class Shifted(nn.ReLU):
        pass

    known = {"F.sigmoid": F.sigmoid, "sigmoid": "sigmoid", "F.relu": F.relu}
    if node_is in known:
        assert patterns.is_activation(the_call(called(known[node_is])), None)
    else:
        module = {"Shifted": Shifted, "Sigmoid": nn.Sigmoid}[node_is]()
        assert patterns.is_activation(the_call(nn.Sequential(module)), module)
    assert not patterns.is_activation(the_call(nn.Sequential(nn.Flatten())), nn.Flatten())
    assert not patterns.is_activation(the_call(called(torch.flatten)), None)


@pytest.mark.parametrize(
    ("write", "in_place", "options", "of_two"),
    [
        (lambda x, y: x + y, False, (), True),
        (lambda x, y: torch.add(x, other=y), False, (), True),
        (lambda x, y: torch.add(x, y, alpha=1), False, (), True),
        (lambda x, y: torch.add(x, y, alpha=2), False, ("alpha",), False),
        (lambda x, y: x.add(y), False, (), True),
        (lambda x, y: x.add_(y), True, (), True),
        (lambda x, y: operator.iadd(x, y), False, (), True),  # by torch.fx, which takes it for x + y
        (lambda x, y: x + x, False, (), False),
        (lambda x, y: x + 1, False, (), False),
    ],
)
def test_a_sum(write, in_place, options, of_two):
    class Writes(nn.Module):
        def forward(self, x, y):
            return write(x, y)

    found = patterns.addition(the_call(Writes()))
    assert found is not None
    assert (found.in_place, found.options, found.is_of_two_tensors) == (in_place, options, of_two)


def test_what_is_no_sum():
    assert patterns.addition(the_call(called(torch.relu))) is None
    assert patterns.addition(1) is None
